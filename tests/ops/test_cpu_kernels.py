"""CPU kernels: SIMD arithmetic, chunking, threads and forked processes."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from lightspine.ops.cpu import parallel
from lightspine.ops.cpu.cache import kernel
from lightspine.ops.cpu.config import SCRATCH_VECTORS, chunk_length
from lightspine.ops.cpu.simd import VECTOR_BYTES, load, store
from lightspine.ops.cpu.vector_math import exp, exp2, sigmoid, softplus
from lightspine.ops.cross_scan import cross_scan
from support.scans import (
    assert_all_close,
    convert,
    cross_inputs,
    results_and_gradients,
    run_scan,
    scan_inputs,
)


@njit
def by_vectors(function: Any, x: Any, out: Any) -> None:
    for i in range(0, x.size, VECTOR_BYTES // x.itemsize):
        store(out, i, function(load(x, i, x.size - i)), x.size - i)


@njit
def vector_exp(x: Any) -> Any:
    return exp(x)


@njit
def vector_exp2(x: Any) -> Any:
    return exp2(x)


def apply(function: Any, x: np.ndarray) -> np.ndarray:
    out = np.full_like(x, np.nan)
    by_vectors(function, x, out)
    return out


@pytest.mark.parametrize(
    ("function", "exact", "bound"),
    [
        (vector_exp, np.exp, 1.5e-7),
        (vector_exp2, np.exp2, 1.5e-7),
        (softplus, lambda x: np.logaddexp(0, x), 2.5e-7),
        (sigmoid, lambda x: 1 / (1 + np.exp(-x)), 3e-7),
    ],
    ids=["exp", "exp2", "softplus", "sigmoid"],
)
def test_float32_function_is_within_its_stated_error(function: Any, exact: Any, bound: float) -> None:
    x = np.concatenate([np.linspace(-87, 88, 500_001), np.linspace(-1e-3, 1e-3, 100_001)]).astype(np.float32)
    expected = exact(x.astype(np.float64))
    assert np.abs(apply(function, x) / expected - 1).max() < bound


def test_exp_at_its_ends() -> None:
    x = np.array([0, -0.0, -88, -np.inf, 100, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(apply(vector_exp, x), [1, 1, 0, 0, np.inf, np.inf, np.nan])


def test_exp2_at_its_ends() -> None:
    x = np.array([0, -0.0, -127, -np.inf, 130, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(apply(vector_exp2, x), [1, 1, 0, 0, np.inf, np.inf, np.nan])


def test_softplus_and_sigmoid_at_their_ends() -> None:
    x = np.array([-np.inf, -200, 200, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(apply(softplus, x), [0, 0, 200, np.inf, np.nan])
    np.testing.assert_array_equal(apply(sigmoid, x), [0, 0, 1, 1, np.nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision_is_rounded_as_by_pytorch(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(1003) * 10.0**e for e in range(-9, 6)])
    x[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    carrier = np.int16 if dtype == torch.bfloat16 else np.uint16
    out = torch.zeros(x.shape, dtype=dtype)
    widened = torch.zeros(x.shape)
    copy_vectors(x.numpy(), out.view(torch.int16).numpy().view(carrier))
    copy_vectors(out.view(torch.int16).numpy().view(carrier), widened.numpy())
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(widened, out.float(), rtol=0, atol=0, equal_nan=True)


@njit
def copy_vectors(source: Any, target: Any) -> None:
    for i in range(0, source.size, 16):
        store(target, i, load(source, i, source.size - i), source.size - i)


def test_kernel_that_cannot_be_kept_on_disk_warns_and_runs() -> None:
    # A function without a file has no cache folder, as if no folder were writable.
    function = eval("lambda x: x + 1")
    with pytest.warns(RuntimeWarning, match="set NUMBA_CACHE_DIR"):
        compiled = kernel(function)
    assert compiled(1) == 2


@pytest.mark.parametrize(("length", "state_dim"), [(3000, 1), (600, 16)])
def test_sequence_of_several_chunks_equals_reference(length: int, state_dim: int) -> None:
    assert chunk_length(length, state_dim) < length
    inputs = convert(scan_inputs(1, 4, length, state_dim, 1), torch.float32)
    exact = type(inputs)(*(t.double() for t in inputs))
    actual = results_and_gradients(run_scan, inputs, delta_softplus=True, backend="cpu")
    expected = results_and_gradients(run_scan, exact, delta_softplus=True, backend="reference")
    assert_all_close(actual, expected, torch.float32)


@pytest.mark.parametrize(("length", "state_dim"), [(3000, 1), (600, 16)])
def test_backward_without_the_states_of_the_forward_finds_them_itself(length: int, state_dim: int) -> None:
    inputs = convert(scan_inputs(1, 4, length, state_dim, 1), torch.float32)
    out, state, kept = torch.ops.lightspine.selective_scan(*inputs, True, False, True, "cpu")
    assert kept.numel() > 0
    backward = torch.ops.lightspine.selective_scan_backward
    arguments = (torch.ones_like(out), torch.ones_like(state), *inputs)
    with_states = backward(*arguments, kept, True, False, "cpu")
    without = backward(*arguments, torch.empty(0), True, False, "cpu")
    for one, other in zip(with_states, without, strict=True):
        torch.testing.assert_close(one, other)


def test_scan_keeps_nothing_where_no_gradient_is_recorded() -> None:
    inputs = convert(scan_inputs(1, 4, 3000, 1, 1), torch.float32)
    assert torch.ops.lightspine.selective_scan(*inputs, True, False, False, "cpu")[2].numel() == 0


@pytest.mark.parametrize("length", [1, 197, 3136, 100_000])
@pytest.mark.parametrize("state_dim", [1, 16])
def test_scratch_of_the_backward_does_not_grow_with_the_sequence(length: int, state_dim: int) -> None:
    chunk = chunk_length(length, state_dim)
    assert 1 <= chunk <= length
    assert chunk * (2 * state_dim + 4) <= SCRATCH_VECTORS


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large_map() -> Any:
    return convert(cross_inputs(1, 24, 24, 100, 1), torch.float32)


def run_map(inputs: Any) -> Any:
    return cross_scan(*inputs, backend="cpu")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_result_is_the_same_on_several_threads(threads: Any, count: int) -> None:
    threads(1)
    alone = results_and_gradients(run_map, large_map())
    threads(count)
    together = results_and_gradients(run_map, large_map())
    assert torch.equal(alone["output 0"], together["output 0"])
    assert_all_close(together, alone, torch.float32)


def test_pool_gives_what_the_team_gives(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads(2)
    by_team = results_and_gradients(run_map, large_map())
    monkeypatch.setattr(parallel, "find_openmp", lambda: None)
    by_pool = results_and_gradients(run_map, large_map())
    assert all(torch.equal(by_team[name], by_pool[name]) for name in by_pool)


def test_eight_python_threads_at_once_get_their_own_results(threads: Any) -> None:
    threads(2)
    jobs = [convert(cross_inputs(1, 20, 20, 48, 2, seed=seed), torch.float32) for seed in range(8)]
    expected = [results_and_gradients(run_map, job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda job: results_and_gradients(run_map, job), jobs))
            for one, other in zip(actual, expected, strict=True):
                assert all(torch.equal(one[name], other[name]) for name in other)


def _send_result(queue: Any, inputs: Any) -> None:
    queue.put(run_map(inputs).numpy().tobytes())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_scan_runs_in_a_forked_child(threads: Any) -> None:
    # The parent's other threads do not exist in the child. The child runs nothing but the scan, because
    # PyTorch's own parallel loops do not survive a fork.
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill its memory by such a loop
    threads(2)
    inputs = large_map()
    expected = run_map(inputs).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_send_result, args=(queue, inputs), daemon=True)
    child.start()
    try:
        received = queue.get(timeout=60)
    finally:
        child.kill()
        child.join()
    assert received == expected


def test_inputs_are_left_as_they_were() -> None:
    inputs = convert(scan_inputs(), torch.float32)
    copies = [t.clone() for t in inputs]
    results_and_gradients(run_scan, inputs, delta_softplus=True, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
