"""The benchmark runs the scans with the backend that the result row names."""

from collections.abc import Iterator
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from lightspine.benchmark.prepare import WithScanBackend
from lightspine.errors import LightspineError
from lightspine.models.vmamba import VMamba
from lightspine.ops import reference

# The package exports a function of the same name as the module.
package = import_module("lightspine.ops.cross_scan")


@pytest.fixture
def network() -> nn.Module:
    return VMamba(embed_dims=(8, 16), depths=(1, 1), state_dim=2, num_classes=5).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def plain_scans() -> Iterator[list[None]]:
    """Count the calls of the reference scan."""
    calls: list[None] = []

    def counted(*args: object) -> Tensor:
        calls.append(None)
        return reference.cross_scan_reference(*args)  # type: ignore[arg-type]

    with patch.object(package, "cross_scan_reference", counted):
        yield calls


def test_plain_scan_computes_every_block(network: nn.Module, images: Tensor, plain_scans: list[None]) -> None:
    with torch.inference_mode():
        expected = network(images)
        assert plain_scans == []
        actual = WithScanBackend(network, "reference")(images)
    assert len(plain_scans) == 2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_other_models_keep_their_scans(network: nn.Module, images: Tensor, plain_scans: list[None]) -> None:
    with torch.inference_mode():
        WithScanBackend(network, "reference")(images)
        plain_scans.clear()
        network(images)
    assert plain_scans == []


def test_model_without_scans_is_not_measured_as_one_with_them(images: Tensor) -> None:
    with pytest.raises(LightspineError, match="expected scans to run with 'torch', Conv2d has none"):
        WithScanBackend(nn.Conv2d(3, 3, 1), "torch")(images)
