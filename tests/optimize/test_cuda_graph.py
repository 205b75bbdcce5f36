"""`lightspine.optimize(..., cuda_graph=True)`: refusals everywhere, the graph itself on a GPU."""

import copy
import gc
import threading

import pytest
import torch
from torch import Tensor, nn

import lightspine
from lightspine.errors import UsageError
from lightspine.ops.triton import constants
from lightspine.optimize import CudaGraphModel
from support.exporting import FAMILIES, small_model

IMAGES = torch.zeros(1, 3, 64, 64)
gpu = pytest.mark.gpu


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


def test_graph_of_a_model_on_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="a CUDA graph needs a model on a CUDA device, this one is on cpu"):
        lightspine.optimize(nn.Linear(3, 2).eval(), IMAGES, cuda_graph=True)


def test_graph_without_an_example_is_refused() -> None:
    with pytest.raises(UsageError, match="cuda_graph=True needs an example of the images"):
        lightspine.optimize(nn.Linear(3, 2).eval(), cuda_graph=True)  # type: ignore[call-overload]


def test_example_without_a_graph_is_refused() -> None:
    with pytest.raises(UsageError, match="an example is used with cuda_graph=True only"):
        lightspine.optimize(nn.Linear(3, 2).eval(), IMAGES)  # type: ignore[call-overload]


def test_tensors_that_a_launch_reads_from_a_cache_are_collected() -> None:
    kept, later = torch.zeros(2), torch.zeros(3)
    with constants.collect_constants() as collected:
        assert constants.use_constant(kept) is kept
    constants.use_constant(later)
    assert len(collected) == 1
    assert collected[0] is kept


@gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_graph_gives_the_values_of_the_optimized_model(family: str, device: str) -> None:
    model = small_model(family).to(device)
    images = [torch.randn(2, 3, 64, 96, device=device) for _ in range(3)]
    captured = lightspine.optimize(model, images[0], cuda_graph=True)
    outputs = [captured(x) for x in images]
    for x, actual in zip(images, outputs, strict=True):
        torch.testing.assert_close(actual, captured.model(x))


@gpu
@torch.inference_mode()
def test_graph_outlives_the_caches_that_it_reads(device: str) -> None:
    from lightspine.ops.triton import cross_scan_launch

    model, images = small_model("vmamba").to(device), torch.randn(2, 3, 64, 96, device=device)
    captured = lightspine.optimize(model, images, cuda_graph=True)
    expected = captured(images)
    cross_scan_launch.find_walk.cache_clear()
    gc.collect()
    # Would reuse the memory of the scan orders.
    filled = [torch.full((n,), -1, dtype=torch.int32, device=device) for n in (96, 192, 384, 768) * 64]
    assert torch.equal(captured(images), expected)
    assert len(filled) == 256


@gpu
@torch.inference_mode()
def test_graph_refuses_what_it_was_not_captured_for(device: str) -> None:
    model = small_model("shvit").to(device)
    captured = lightspine.optimize(model, torch.zeros(2, 3, 64, 64, device=device), cuda_graph=True)
    for other in (
        torch.zeros(1, 3, 64, 64, device=device),
        torch.zeros(2, 3, 64, 64, device=device, dtype=torch.float16),
        torch.zeros(2, 3, 64, 64),
    ):
        with pytest.raises(UsageError, match=r"takes images of shape \(2, 3, 64, 64\), float32"):
            captured(other)
    with pytest.raises(UsageError, match="captured for inference"):
        captured.train()
    with pytest.raises(UsageError, match="keeps the device and dtype"):
        captured.half()
    with pytest.raises(UsageError, match="cannot be copied or saved"):
        copy.deepcopy(captured)


@gpu
def test_graph_computes_no_gradients(device: str) -> None:
    images = torch.zeros(1, 3, 64, 64, device=device)
    captured = lightspine.optimize(small_model("shvit").to(device), images, cuda_graph=True)
    assert not captured(images).requires_grad
    with pytest.raises(UsageError, match="computes no gradients"):
        captured(images.requires_grad_())


@gpu
def test_threads_share_a_graph(device: str) -> None:
    model = small_model("shvit").to(device)
    images = [torch.randn(2, 3, 64, 64, device=device) for _ in range(4)]
    captured = lightspine.optimize(model, images[0], cuda_graph=True)
    outputs: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                outputs[index] = captured(images[index])
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(images):
        torch.testing.assert_close(outputs[index], captured.model(x))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@torch.inference_mode()
def test_graphs_are_captured_on_the_device_of_their_model() -> None:
    for device in ("cuda:0", "cuda:1"):
        images = torch.randn(1, 3, 64, 64, device=device)
        captured = lightspine.optimize(small_model("shvit").to(device), images, cuda_graph=True)
        torch.testing.assert_close(captured(images + 1), captured.model(images + 1))


@gpu
def test_loaded_weights_take_effect_in_the_graph(device: str) -> None:
    images = torch.randn(1, 3, 64, 64, device=device)
    captured = lightspine.optimize(small_model("shvit").to(device), images, cuda_graph=True)
    assert isinstance(captured, CudaGraphModel)
    with torch.no_grad():
        for parameter in captured.model.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(captured(images), captured.model(images))
