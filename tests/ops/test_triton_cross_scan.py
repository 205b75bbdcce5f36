"""The Triton kernels of `projected_cross_scan`: interpreted, compiled without a device, and run on one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightspine.errors import UsageError
from lightspine.ops.cross_scan import fuses_projection, projected_cross_scan, unfused_projection
from lightspine.ops.scan_orders import scan_order
from support.reference import relative_l2

pytest.importorskip("triton", reason="triton is not installed")

from lightspine.ops.triton import cross_scan_launch
from support.fused_cases import FAST_CASES, SLOW_CASES, make_inputs, run_definition
from support.scans import TOLERANCE, results_and_gradients

ROOT = Path(__file__).parents[2]
compiled_only = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing is compiled"
)
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@functools.cache
def interpret(table: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Run a table of cases in a process whose kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "support.fused_cases", table],
        cwd=ROOT / "tests",
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_case(table: str, case: str) -> None:
    report = interpret(table)[case]
    assert report
    # Not `difference > tolerance`: a NaN is neither.
    too_far = {name: pair for name, pair in report.items() if not pair[0] <= pair[1]}
    assert not too_far, "{tensor: (difference, tolerance)}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", FAST_CASES)
def test_interpreted_kernels_equal_the_definition(case: str) -> None:
    check_case("fast", case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", SLOW_CASES)
def test_interpreted_kernels_equal_the_definition_at_larger_sizes(case: str) -> None:
    check_case("slow", case)


@pytest.mark.parametrize("order", ["cross2d", "bidirectional"])
def test_opposite_directions_are_one_family(order: str) -> None:
    pixels = scan_order(order, 3, 5)
    walk = cross_scan_launch.walk_order(pixels)
    assert walk.pairs == 2
    torch.testing.assert_close(walk.order.long(), pixels[:2])


def test_directions_without_opposite_are_walked_alone() -> None:
    assert cross_scan_launch.walk_order(scan_order("unidirectional", 3, 5)).pairs == 1


@pytest.mark.parametrize("length", [1, 49, 63, 64, 197, 3136, 65536])
@pytest.mark.parametrize("batch", [0, 1, 128])
def test_chunks_are_whole_tiles_of_at_least_64_steps(length: int, batch: int) -> None:
    chunk, chunks = cross_scan_launch.choose_chunks(length, 96, batch, 64)
    assert chunk % cross_scan_launch.TILE == 0
    assert (chunks - 1) * chunk < length <= chunks * chunk
    assert chunks <= max(1, length // 64)


def test_projection_is_not_fused_on_a_cpu() -> None:
    assert not fuses_projection(torch.zeros(1, 2, 2, 3), 1)


@compiled_only
def test_kernels_refuse_cpu_tensors_where_nothing_is_interpreted() -> None:
    inputs = make_inputs(dtype=torch.float32)
    x, projected, weight, A, D, bias = inputs
    walk = cross_scan_launch.find_walk("cross2d", 3, 5, torch.device("cpu"))
    arguments = cross_scan_launch.ProjectedInputs(
        x.flatten(1, 2), projected.flatten(1, 2), weight, A[..., 0], D, bias
    )
    with pytest.raises(UsageError, match=r"expect CUDA tensors, or TRITON_INTERPRET=1"):
        cross_scan_launch.cross_scan_forward(arguments, walk, False)


@compiled_only
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_keep_the_budget_of_instructions() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "kernel_report.py", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert all(row["stack_bytes"] == 0 for row in report)
    rows = [row for row in report if row["kernel"].startswith("fused_")]
    assert {row["kernel"] for row in rows} == {
        "fused_cross_scan_fwd_kernel",
        "fused_chunk_state_kernel",
        "fused_state_passing_kernel",
        "fused_cross_scan_bwd_kernel",
    }
    half = [row for row in rows if "bfloat16" in row["case"]]
    forward = [row for row in half if row["kernel"] == "fused_cross_scan_fwd_kernel"]
    assert all(row["instructions_per_step"] <= 45 for row in forward)
    vim = [row for row in report if row["kernel"] == "chunk_scan_fwd_kernel" and row["states"] == 16]
    assert len(vim) >= 5
    assert all(row["instructions_per_step"] <= 150 for row in vim)


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("side", "dim", "rank"), [(56, 96, 6), (28, 192, 12), (14, 384, 24), (7, 768, 48), (5, 100, 7)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_kernels_on_a_device_equal_the_definition(
    dtype: torch.dtype, side: int, dim: int, rank: int, batch: int
) -> None:
    inputs = make_inputs(batch, side, side, dim, rank, dtype=dtype)
    inputs = type(inputs)(*(t.cuda() for t in inputs))
    assert fuses_projection(inputs.x, 1)
    actual = results_and_gradients(lambda t: projected_cross_scan(*t), inputs)
    expected = results_and_gradients(run_definition, type(inputs)(*(t.double() for t in inputs)))
    for name, tensor in actual.items():
        # The hardware's exponential and the split products of float32 have relative errors of 2^-22.
        tolerance = max(TOLERANCE[tensor.dtype], TOLERANCE[dtype], 1e-5)
        assert relative_l2(tensor, expected[name]) <= tolerance, name


@pytest.mark.gpu
@on_device
def test_kernels_on_a_device_are_deterministic() -> None:
    inputs = make_inputs(2, 56, 56, 96, 6, dtype=torch.bfloat16)
    inputs = type(inputs)(*(t.cuda() for t in inputs))
    first, second = (results_and_gradients(lambda t: projected_cross_scan(*t), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@on_device
def test_observers_see_the_steps_on_a_device() -> None:
    x = torch.zeros(1, 2, 2, 3, device="cuda")
    with unfused_projection():
        assert not fuses_projection(x, 1)
    assert fuses_projection(x, 1)


@pytest.mark.gpu
@on_device
def test_scan_and_its_backward_are_captured_in_a_cuda_graph() -> None:
    inputs = make_inputs(1, 14, 14, 96, 6, dtype=torch.bfloat16)
    leaves = type(inputs)(*(t.cuda().requires_grad_() for t in inputs))

    def step() -> tuple[torch.Tensor, ...]:
        out = projected_cross_scan(*leaves)
        # Detached, because an autograd graph that is still alive would tie the capture to the default stream.
        return out.detach(), *torch.autograd.grad(out.square().sum(), tuple(leaves))

    # The first call compiles the kernels and copies the scan order; it cannot be captured.
    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
