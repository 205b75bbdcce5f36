"""ONNX export of the scans: every form against the operators."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.export.onnx_graph import define_scans, to_onnx
from lightspine.export.program import trace
from lightspine.export.verification import compare, open_session, random_batches, session_function
from lightspine.ops import cross_scan, list_scan_orders, register_scan_order, scan_order
from lightspine.ops.onnx import IN_CACHE
from lightspine.ops.selective_scan import scan
from support.exporting import disturb

DIM = 3


def snake(height: int, width: int) -> Tensor:
    """Return a user-defined order in PyTorch operations: every second row and column reversed."""

    def rows(pixels: Tensor) -> Tensor:
        odd = torch.arange(pixels.shape[0])[:, None] % 2 == 1
        return torch.where(odd, pixels.flip(1), pixels).flatten()

    pixels = torch.arange(height * width).view(height, width)
    down = [rows(pixels), rows(pixels.t())]
    return torch.stack([*down, *(order.flip(0) for order in down)])


def zigzag(height: int, width: int) -> Tensor:
    """Return a user-defined order derived from a registered one."""
    return scan_order("cross2d", height, width)[[1, 0, 3, 2]]


def in_numpy(height: int, width: int) -> Tensor:
    """Return a user-defined order computed in NumPy."""
    draw = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draw.permutation(height * width) for _ in range(4)]))


for order_fn in (snake, zigzag, in_numpy):
    register_scan_order(order_fn.__name__, order_fn)

# All registered orders and some user-defined ones.
ORDERS = [name for name in list_scan_orders() if name != "in_numpy" and "exported" not in name]


class Cross(nn.Module):
    """`cross_scan` over an image whose dt and projections are linear in the pixels."""

    def __init__(self, state_dim: int, order: str, softplus: bool = True, extras: bool = True):
        super().__init__()
        self.order, self.softplus, self.state_dim = order, softplus, state_dim
        self.projections = nn.Linear(DIM, 4 * (DIM + 2 * state_dim))
        self.A = nn.Parameter(-torch.rand(4, DIM, state_dim) - 0.1)
        self.D = nn.Parameter(torch.rand(4, DIM)) if extras else None
        self.bias = nn.Parameter(torch.rand(4, DIM)) if extras else None

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 2, 3, 1)
        projected = self.projections(x).unflatten(3, (4, -1))
        delta, B, C = projected.split([DIM, self.state_dim, self.state_dim], dim=4)
        delta = delta if self.softplus else delta.sigmoid()
        return cross_scan(x, delta, self.A, B, C, self.D, self.bias, self.softplus, self.order)


class Selective(nn.Module):
    """`selective_scan` over the pixels of an image."""

    def __init__(self, reverse: bool, softplus: bool = True, gated: bool = True, groups: int = 1):
        super().__init__()
        self.reverse, self.softplus, self.gated, self.groups = reverse, softplus, gated, groups
        self.A = nn.Parameter(-torch.rand(DIM, 4) - 0.1)
        self.project = nn.Linear(DIM, 8)
        self.bias = nn.Parameter(torch.rand(DIM)) if gated else None

    def forward(self, images: Tensor) -> Tensor:
        u = images.flatten(2)
        B, C = (
            t.unsqueeze(1).expand(-1, self.groups, -1, -1)
            for t in self.project(u.transpose(1, 2)).transpose(1, 2).chunk(2, 1)
        )
        delta = u.sigmoid()
        z = u if self.gated else None
        return scan(u, delta, self.A, B, C, None, z, self.bias, self.softplus, self.reverse)


def as_onnx(network: nn.Module, *, scan_form: Any = "loop", size: tuple[int, int] | None = None) -> Any:
    program = trace(network, torch.randn(2, DIM, *(size or (5, 9))), fixed=size is not None)
    sides: tuple[Any, Any] = size or ("height", "width")
    axes = ("batch", DIM, *sides)
    model = to_onnx(program, opset=20, scan=scan_form, inputs={"images": axes}, output_names=["y"])
    return define_scans(model, 20, inline=True)


FORMS = {
    "one state": Cross(1, "cross2d"),
    "one state, steps given": Cross(1, "bidirectional", softplus=False, extras=False),
    "states": Cross(4, "unidirectional"),
    "states, steps given": Cross(4, "cross2d", softplus=False),
    "ahead": Selective(False),
    "backwards": Selective(True, softplus=False, gated=False),
}


@pytest.mark.parametrize("network", FORMS.values(), ids=FORMS)
def test_loop_gives_the_operator_s_values_at_any_size(network: nn.Module) -> None:
    run = session_function(open_session(as_onnx(disturb(network)).SerializeToString()))
    # The last case: one state, two blocks of the loop, the second one incomplete.
    sizes = [(1, 2, 2), (2, 5, 7), (1, 8, 8), (1, 3, 40), (1, 53, 60)]
    assert IN_CACHE / (4 * DIM) < 53 * 60 < 2 * (IN_CACHE // (4 * DIM))
    for found in compare(network, run, random_batches(DIM, sizes)):
        assert found.relative < 2e-6, found


@pytest.mark.parametrize(
    "network",
    [
        # The order with a row or column in either direction; the others differ by their constants.
        *(
            pytest.param(Cross(4, order), marks=() if order == "cross2d" else pytest.mark.slow)
            for order in ORDERS
        ),
        FORMS["backwards"],
    ],
    ids=[*ORDERS, "selective"],
)
def test_unrolled_scan_gives_the_operator_s_values(network: nn.Module) -> None:
    model = as_onnx(disturb(network), scan_form="unrolled", size=(5, 7))
    run = session_function(open_session(model.SerializeToString()))
    for found in compare(network, run, random_batches(DIM, [(1, 5, 7), (3, 5, 7)])):
        assert found.relative < 2e-6, found


@pytest.mark.parametrize("state_dim", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_every_registered_order_is_exported_with_free_sizes(order: str, state_dim: int) -> None:
    network = disturb(Cross(state_dim, order))
    run = session_function(open_session(as_onnx(network).SerializeToString()))
    for found in compare(network, run, random_batches(DIM, [(2, 5, 7), (1, 8, 3)])):
        assert found.relative < 2e-6, found


@pytest.mark.parametrize("order", [*ORDERS, "in_numpy"])
def test_every_registered_order_is_exported_with_a_fixed_size(order: str) -> None:
    network = disturb(Cross(1, order))
    run = session_function(open_session(as_onnx(network, size=(5, 7)).SerializeToString()))
    for found in compare(network, run, random_batches(DIM, [(1, 5, 7), (3, 5, 7)])):
        assert found.relative < 2e-6, found


def test_order_that_needs_numbers_for_the_sizes_is_refused_with_free_sizes() -> None:
    with pytest.raises(UsageError, match="'in_numpy' cannot be exported with free image sizes"):
        as_onnx(disturb(Cross(1, "in_numpy")))


def test_groups_of_channels_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="has one group of channels, received 3"):
        as_onnx(Selective(False, groups=3).eval())
