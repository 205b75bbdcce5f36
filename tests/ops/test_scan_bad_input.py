"""Error messages of the scan operators for invalid inputs."""

from typing import Any

import pytest
import torch

from lightspine.errors import UsageError
from lightspine.ops import cross_scan, register_scan_order, scan_order
from lightspine.ops.scan_orders import _ORDERS
from lightspine.ops.selective_scan import scan
from support.scans import CPU_BACKENDS, cross_inputs, run_scan, scan_inputs

ZEROS = torch.zeros

SCAN_CASES: list[tuple[dict[str, Any], str]] = [
    ({"u": ZEROS(2, 8)}, r"u of shape \(B, D, L\), received \(2, 8\)"),
    ({"u": ZEROS(2, 8, 0)}, "L of at least 1, received L = 0"),
    ({"u": ZEROS(2, 8, 37, dtype=torch.int64)}, "u of a real floating dtype, received torch.int64"),
    (
        {"u": ZEROS(2, 8, 37, dtype=torch.complex64)},
        "u of a real floating dtype, received torch.complex64",
    ),
    ({"delta": ZEROS(2, 8, 36)}, r"delta of shape \(2, 8, 37\), received \(2, 8, 36\)"),
    ({"delta": ZEROS(2, 8, 37, dtype=torch.int32)}, "delta of a real floating dtype, received torch.int32"),
    ({"delta": ZEROS(2, 8, 37, device="meta")}, "all tensors on cpu, received delta on meta"),
    ({"A": ZEROS(7, 4)}, r"A of shape \(D=8, N\), received \(7, 4\)"),
    ({"A": ZEROS(8, 4, dtype=torch.complex64)}, "A of a real floating dtype, received torch.complex64"),
    ({"A": ZEROS(8, 0), "B": ZEROS(2, 2, 0, 37)}, "N of at least 1, received N = 0"),
    ({"B": ZEROS(2, 3, 4, 37)}, "received D=8 and K=3"),
    ({"B": ZEROS(2, 2, 5, 37)}, r"B of shape \(2, 2, 4, 37\), received \(2, 2, 5, 37\)"),
    ({"B": ZEROS(8, 3)}, r"B of shape \(B, N, L\), \(B, K, N, L\) or \(D, N\), received \(8, 3\)"),
    ({"C": ZEROS(2, 1, 4, 37)}, r"C of shape \(2, 2, 4, 37\), received \(2, 1, 4, 37\)"),
    ({"D": ZEROS(4)}, r"D of shape \(8,\), received \(4,\)"),
    ({"z": ZEROS(2, 8, 1)}, r"z of shape \(2, 8, 37\), received \(2, 8, 1\)"),
    ({"delta_bias": ZEROS(8, 1)}, r"delta_bias of shape \(8,\), received \(8, 1\)"),
]

CROSS_CASES: list[tuple[dict[str, Any], str]] = [
    ({"x": ZEROS(2, 35, 6)}, r"x of shape \(B, H, W, D\), received \(2, 35, 6\)"),
    ({"x": ZEROS(2, 0, 7, 6)}, "H of at least 1, received H = 0"),
    ({"x": ZEROS(2, 5, 7, 6, dtype=torch.int16)}, "x of a real floating dtype, received torch.int16"),
    ({"delta": ZEROS(2, 5, 7, 6, 4)}, r"delta of shape \(2, 5, 7, 4, 6\), received \(2, 5, 7, 6, 4\)"),
    ({"A": ZEROS(24, 2)}, r"A of shape \(K, D=6, N\), received \(24, 2\)"),
    ({"A": ZEROS(4, 6, 0)}, "N of at least 1, received N = 0"),
    ({"B": ZEROS(2, 5, 7, 4, 2, device="meta")}, "all tensors on cpu, received B on meta"),
    ({"C": ZEROS(2, 5, 7, 2, 4)}, r"C of shape \(2, 5, 7, 4, 2\), received \(2, 5, 7, 2, 4\)"),
    ({"D": ZEROS(24)}, r"D of shape \(4, 6\), received \(24,\)"),
    ({"delta_bias": ZEROS(24)}, r"delta_bias of shape \(4, 6\), received \(24,\)"),
]


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.parametrize(
    ("change", "message"), SCAN_CASES, ids=lambda case: "-".join(case) if isinstance(case, dict) else None
)
def test_selective_scan_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_scan(scan_inputs()._replace(**change), backend=backend)


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.parametrize(
    ("change", "message"), CROSS_CASES, ids=lambda case: "-".join(case) if isinstance(case, dict) else None
)
def test_cross_scan_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cross_scan(*cross_inputs()._replace(**change), backend=backend)


def test_scan_of_the_models_refuses_a_wrong_shape() -> None:
    inputs = scan_inputs()
    with pytest.raises(UsageError, match="delta of shape"):
        scan(*inputs._replace(delta=inputs.delta[:, :, 1:]))


@pytest.mark.parametrize(
    "run",
    [
        lambda name: run_scan(scan_inputs(), backend=name),
        lambda name: cross_scan(*cross_inputs(), backend=name),
    ],
    ids=["selective", "cross"],
)
def test_unknown_backend_lists_the_known_ones(run: Any) -> None:
    with pytest.raises(UsageError, match="unknown scan backend 'cuda': expected auto, reference, torch"):
        run("cuda")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_unknown_order_lists_the_known_ones(backend: str) -> None:
    with pytest.raises(UsageError, match="unknown scan order 'spiral': expected one of cross2d, "):
        cross_scan(*cross_inputs(), order="spiral", backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_order_with_other_directions_is_refused(backend: str) -> None:
    with pytest.raises(UsageError, match="K=4 for the order 'cross2d', received K=2"):
        cross_scan(*cross_inputs(groups=2), backend=backend)


def test_order_name_taken_is_refused() -> None:
    with pytest.raises(UsageError, match="'cross2d' is already registered"):
        register_scan_order("cross2d", lambda height, width: torch.arange(height * width)[None])


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            lambda height, width: torch.arange(height * width),
            r"shape \(K, 6\) for a 2x3 map, received \(6,\)",
        ),
        (lambda height, width: torch.zeros(1, height * width), "direction 0 to visit each of the 6 pixels"),
        (
            lambda height, width: torch.arange(1, height * width + 1)[None],
            "direction 0 to visit each of the 6",
        ),
    ],
    ids=["shape", "repeated", "outside"],
)
def test_order_that_is_no_permutation_is_refused(
    order: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_ORDERS, "bad", order)
    with pytest.raises(UsageError, match=message):
        scan_order("bad", 2, 3)
