"""Triton kernels: interpreted on a CPU, compiled ahead of time, and run on a GPU if there is one."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.blocks import VimMixer
from lightspine.errors import UsageError
from lightspine.ops import bidirectional_scan, causal_conv1d
from lightspine.ops.add_norm import add_norm
from lightspine.ops.cross_scan import cross_scan
from lightspine.ops.dispatch import load_backend
from support.reference import relative_l2
from support.scans import (
    TOLERANCE,
    bidirectional_inputs,
    conv_inputs,
    convert,
    cross_inputs,
    results_and_gradients,
    run_scan,
    scan_inputs,
)
from support.triton_cases import FAST_CASES, SLOW_CASES

pytest.importorskip("triton", reason="triton is not installed")

TESTS = Path(__file__).parents[1]
compiled_only = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing is compiled"
)
KERNELS = [
    "chunk_adjoint_kernel",
    "chunk_scan_bwd_kernel",
    "chunk_scan_fwd_kernel",
    "state_passing_kernel",
]
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@functools.cache
def interpret(table: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Run a table of cases in a subprocess with Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "support.triton_cases", table],
        cwd=TESTS,
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


@pytest.mark.parametrize("case", FAST_CASES)
def test_interpreted_kernels_equal_the_definition(case: str) -> None:
    check_case("fast", case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", SLOW_CASES)
def test_interpreted_kernels_equal_the_definition_at_larger_sizes(case: str) -> None:
    check_case("slow", case)


@compiled_only
def test_kernels_refuse_cpu_tensors_where_nothing_is_interpreted() -> None:
    inputs = scan_inputs()
    with pytest.raises(
        UsageError, match=r"expect CUDA tensors, or TRITON_INTERPRET=1 .* received CPU tensors"
    ):
        load_backend("triton").selective_scan(inputs, True, False, False)


class Toolchain:
    """Fake Triton driver that names a compile target and runs nothing."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Compile the kernels for the launch arguments and collect them by name."""
    from triton.runtime import driver

    from lightspine.ops.triton import launch

    kernels: dict[str, Any] = {}

    def compile_only(kernel: Any, programs: int, *, num_warps: int = 1, **arguments: Any) -> None:
        options = {"num_warps": num_warps, "enable_fp_fusion": True}
        kernels[kernel.__name__] = kernel.warmup(**arguments, **options, grid=(programs,))

    monkeypatch.setattr(launch, "launch", compile_only)
    driver.set_active(Toolchain())
    yield kernels
    driver.set_active(None)


@compiled_only
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("state_dim", [1, 16])
def test_kernels_of_the_selective_scan_compile_without_a_device(
    compiled: dict[str, Any], dtype: torch.dtype, state_dim: int
) -> None:
    inputs = convert(scan_inputs(1, 64, 200, state_dim, 1), dtype)
    triton = load_backend("triton")
    out, state, saved = triton.selective_scan(inputs, True, True, True)
    triton.selective_scan_backward(out, state, inputs, saved, True, True)
    assert sorted(compiled) == KERNELS
    assert all(kernel.asm["cubin"] for kernel in compiled.values())


@compiled_only
@pytest.mark.slow
def test_kernels_of_the_cross_scan_compile_without_a_device(compiled: dict[str, Any]) -> None:
    inputs = convert(cross_inputs(1, 14, 14, 96, 1), torch.bfloat16)
    triton = load_backend("triton")
    out, saved = triton.cross_scan(inputs, True, "cross2d", True)
    triton.cross_scan_backward(out, inputs, saved, True, "cross2d")
    assert sorted(compiled) == KERNELS


@compiled_only
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernel_of_the_norm_compiles_without_a_device(
    compiled: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightspine.ops.triton import launch, norm_launch

    monkeypatch.setattr(norm_launch, "launch", launch.launch)
    x, weight = torch.zeros(5, 96), torch.zeros(96, dtype=dtype)
    norm_launch.add_norm(x, x.to(dtype), weight, weight, 1e-5, False)
    assert compiled["add_norm_kernel"].asm["cubin"]
    norm_launch.add_norm(x, None, weight, None, 1e-5, True)
    assert compiled["add_norm_kernel"].asm["cubin"]


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("dim", [3, 96, 192, 1024, 2048])
def test_norm_on_a_device_equals_pytorch(dtype: torch.dtype, rms: bool, dim: int) -> None:
    x, update = torch.randn(33, dim, dtype=torch.float64), torch.randn(33, dim, dtype=torch.float64)
    weight, bias = torch.randn(2, dim, dtype=torch.float64)
    tensors = [t.to(dtype).cuda() for t in (x, update, weight, bias)]
    for added in (tensors[1], None):
        inputs = [tensors[0], added, tensors[2], None if rms else tensors[3]]
        exact = [None if t is None else t.double() for t in inputs]
        actual = add_norm(*inputs, 1e-5, rms=rms)
        expected = add_norm(*exact, 1e-5, rms=rms, backend="torch")
        for ours, theirs in zip(actual, expected, strict=True):
            assert relative_l2(ours.double(), theirs) < TOLERANCE[dtype]


def to_device(inputs: Any) -> Any:
    return type(inputs)(*(None if t is None else t.cuda() for t in inputs))


def check_on_device(operator: Any, inputs: Any, dtype: torch.dtype, **options: Any) -> None:
    inputs = to_device(convert(inputs, dtype))
    exact = type(inputs)(*(None if t is None else t.double() for t in inputs))
    actual = results_and_gradients(operator, inputs, backend="triton", **options)
    expected = results_and_gradients(operator, exact, backend="reference", **options)
    for name, tensor in actual.items():
        # The hardware exponential has an error of 2 ulp in every decay.
        tolerance = max(TOLERANCE[tensor.dtype], TOLERANCE[dtype], 5e-6 if dtype != torch.float64 else 0)
        assert relative_l2(tensor, expected[name]) <= tolerance, name


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("batch", "dim", "length", "state_dim"),
    [(2, 384, 197, 16), (1, 384, 1025, 16), (1, 40, 6085, 16), (3, 17, 63, 3), (128, 384, 30, 1)],
)
def test_selective_scan_on_a_device_equals_the_definition(
    dtype: torch.dtype, batch: int, dim: int, length: int, state_dim: int
) -> None:
    inputs = scan_inputs(batch, dim, length, state_dim, 1)
    check_on_device(run_scan, inputs, dtype, delta_softplus=True)


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("side", "dim"), [(56, 96), (28, 192), (14, 384), (7, 768)])
def test_cross_scan_on_a_device_equals_the_definition(dtype: torch.dtype, side: int, dim: int) -> None:
    inputs = cross_inputs(2, side, side, dim, 1)
    check_on_device(lambda tensors, **options: cross_scan(*tensors, **options), inputs, dtype)


@pytest.mark.gpu
@on_device
def test_scan_on_a_device_is_deterministic() -> None:
    inputs = to_device(convert(cross_inputs(2, 28, 28, 96, 1), torch.bfloat16))
    first, second = (results_and_gradients(lambda t: cross_scan(*t), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("batch", "dim", "length"), [(2, 384, 197), (1, 40, 1025), (3, 17, 33)])
def test_bidirectional_scan_on_a_device_equals_the_definition(
    dtype: torch.dtype, batch: int, dim: int, length: int
) -> None:
    inputs = bidirectional_inputs(batch, dim, length, 16)
    check_on_device(
        lambda t, **options: bidirectional_scan(*t, delta_softplus=True, **options), inputs, dtype
    )


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("batch", "dim", "length"), [(2, 384, 197), (1, 40, 1025), (3, 17, 1)])
def test_causal_convolution_on_a_device_equals_pytorch(
    dtype: torch.dtype, batch: int, dim: int, length: int
) -> None:
    inputs = to_device(convert(conv_inputs(batch, dim, length), dtype))
    exact = type(inputs)(*(t.double() for t in inputs))
    options = {"silu": True, "reverse": (False, True)}
    actual = results_and_gradients(lambda t: causal_conv1d(*t, **options), inputs)
    expected = results_and_gradients(lambda t: causal_conv1d(*t, backend="torch", **options), exact)
    for name, tensor in actual.items():
        assert relative_l2(tensor, expected[name]) <= max(TOLERANCE[tensor.dtype], TOLERANCE[dtype]), name


@pytest.mark.gpu
@on_device
def test_mixer_of_vim_is_captured_in_a_cuda_graph() -> None:
    mixer = VimMixer(64, recompute=False).cuda()
    x = torch.randn(1, 64, 7, 7, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        out = mixer(x)
        # Detached, because an autograd graph that is still alive would tie the capture to the default stream.
        return out.detach(), *torch.autograd.grad(out.square().sum(), (x, *mixer.parameters()))

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
