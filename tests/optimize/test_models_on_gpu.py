"""Optimized and compiled copies on a GPU equal the original within the error of the dtype."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lightspine
from support.exporting import FAMILIES, small_model
from support.reference import relative_l2

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative error of rounding once, times what a network of a few layers makes of it.
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 4e-3}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Compilers of PyTorch warn of what they deprecate themselves, and that float32 products could be rounded.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuDNN convolve float32 in float32, as the products are computed, and not in TF32.

    A compiler turns convolutions into products, and some gradients are small differences of large numbers.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(family: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model on the GPU, images, and the logits of a CPU in float64."""
    model, images = small_model(family), torch.randn(4, 3, 64, 96)
    model, images = model.to(dtype), images.to(dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(images.double())
    return model.cuda(), images.cuda(), expected


@every_dtype
@every_family
@torch.inference_mode()
def test_optimized_copy_equals_the_original(family: str, dtype: torch.dtype) -> None:
    model, images, expected = on_gpu(family, dtype)
    optimized = lightspine.optimize(model)
    error = relative_l2(optimized(images).cpu().double(), expected)
    own = relative_l2(model(images).cpu().double(), expected)
    assert error < ERRORS[dtype]
    # Not more than what another order of the same sums changes.
    assert error < 2 * own + 1e-3


@every_dtype
@every_family
@torch.inference_mode()
def test_optimized_copy_moved_to_half_precision_equals_the_original(family: str, dtype: torch.dtype) -> None:
    model, images, expected = on_gpu(family, dtype)
    optimized = lightspine.optimize(model.float()).to(dtype)
    assert relative_l2(optimized(images).cpu().double(), expected) < ERRORS[dtype]


@pytest.mark.parametrize("optimized", [False, True], ids=["original", "optimized"])
@every_dtype
@every_family
@torch.no_grad()
def test_compiled_copy_equals_the_original(family: str, dtype: torch.dtype, optimized: bool) -> None:
    model, images, expected = on_gpu(family, dtype)
    compiled = torch.compile(lightspine.optimize(model) if optimized else model, fullgraph=True)
    assert relative_l2(compiled(images).cpu().double(), expected) < ERRORS[dtype]


@every_family
def test_compiled_training_step_has_the_gradients_of_the_original(family: str) -> None:
    model, images, _ = on_gpu(family, torch.float32)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        loss = run(images).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        if expected is not None and expected.norm() > 1e-6:
            assert relative_l2(actual, expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_family
@torch.inference_mode()
def test_autocast_of_the_optimized_copy_equals_the_original(family: str, dtype: torch.dtype) -> None:
    model, images, expected = on_gpu(family, torch.float32)
    optimized = lightspine.optimize(model)
    with torch.autocast("cuda", dtype):
        logits = optimized(images)
    assert relative_l2(logits.cpu().double(), expected) < ERRORS[dtype]
