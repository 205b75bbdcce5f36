"""Fill uninitialized memory with NaN, so that elements that an operator never writes fail the tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    # PyTorch fills the memory of torch.empty and similar functions only in deterministic mode.
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
