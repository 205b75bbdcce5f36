"""Settings for every test: two tests run at a time, so each keeps to one thread."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
