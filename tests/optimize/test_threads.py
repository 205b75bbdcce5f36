"""Optimized models, exported files and scans used by 16 threads at once, and what they keep per size."""

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

import lightspine
import lightspine_runtime
from lightspine.export.onnx_network import load_onnx
from lightspine.ops.cross_scan import cross_scan
from support.exporting import FAMILIES, small_model
from support.fuzz_formats import onnx_classifier
from support.scans import convert, cross_inputs, run_scan, scan_inputs

THREADS = 16
SIZES = [(32, 32), (33, 64), (48, 41), (37, 37), (64, 32)]


@pytest.fixture(autouse=True)
def one_torch_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run_in_threads(run: Callable[[Any], Tensor], inputs: Sequence[Any], rounds: int = 1) -> list[Tensor]:
    """Return the outputs of all inputs, in order, computed by threads that share the function."""

    def call(number: int) -> Tensor:
        # Every thread has an inference mode of its own.
        with torch.inference_mode():
            return run(inputs[number % len(inputs)])

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, range(rounds * THREADS)))


def _check(run: Callable[[Any], Tensor], inputs: Sequence[Any]) -> None:
    with torch.inference_mode():
        expected = [run(value) for value in inputs]
    for number, found in enumerate(_run_in_threads(run, inputs)):
        torch.testing.assert_close(found, expected[number % len(inputs)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_optimized_model_gives_the_same_in_many_threads(family: str) -> None:
    torch.manual_seed(0)
    model = lightspine.optimize(small_model(family))
    _check(model, [torch.randn(1, 3, height, width) for height, width in SIZES])


def test_exported_file_gives_the_same_in_many_threads(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_classifier())
    torch.manual_seed(0)
    network, _ = load_onnx(tmp_path / "model.onnx", threads=1)
    _check(network, [torch.randn(batch, 3, 32, 32) for batch in range(1, 7)])
    model = lightspine_runtime.OnnxModel(tmp_path / "model.onnx", threads=1)
    draw = np.random.default_rng(0)
    batches = [draw.standard_normal((batch, 3, 32, 32), dtype=np.float32) for batch in range(1, 7)]
    _check(lambda batch: torch.from_numpy(model.run(batch)[0]), batches)


def test_scans_give_the_same_in_many_threads() -> None:
    maps = [convert(cross_inputs(1, height, width, seed=height), torch.float32) for height, width in SIZES]
    _check(lambda inputs: cross_scan(*inputs), maps)
    sequences = [
        convert(scan_inputs(1, length=length, seed=length), torch.float32) for length in (5, 33, 64, 100, 257)
    ]
    _check(lambda inputs: run_scan(inputs, delta_softplus=True)[0], sequences)


def _count_bytes() -> int:
    """Return the memory of all dense CPU tensors that exist."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # Tests that ran before leave tensors without memory of their own: fake ones, which are a subclass,
        # and those of functorch, which are not.
        if (
            type(thing) in (Tensor, torch.nn.Parameter)
            and not is_functorch_wrapped_tensor(thing)
            and thing.is_cpu
            and thing.layout == torch.strided
        ):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize(
    ("family", "optimized"),
    [*((family, True) for family in FAMILIES if family != "shvit"), ("vmamba", False)],
)
def test_tensors_kept_for_sizes_do_not_grow(family: str, optimized: bool) -> None:
    model = small_model(family)
    if optimized:
        model = lightspine.optimize(model)
    sizes = [(height, width) for height in range(32, 65, 3) for width in range(32, 65, 2)]

    def forward(chosen: Sequence[tuple[int, int]]) -> None:
        with torch.inference_mode():
            for height, width in chosen:
                model(torch.zeros(1, 3, height, width))

    # The scan orders of 64 maps are kept, of which every image has two or more.
    forward(sizes[:45])
    before = _count_bytes()
    forward(sizes[45:60])
    assert _count_bytes() - before < 2**18
