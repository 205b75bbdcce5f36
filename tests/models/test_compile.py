"""`torch.compile` of every family: one graph, few compilations over batch sizes, values and gradients."""

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightspine
from support.exporting import FAMILIES, small_model
from support.reference import relative_l2

BATCHES = (1, 2, 3, 5)
every_family = pytest.mark.parametrize("family", FAMILIES)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting_backend() -> Any:
    # Importing the compiler takes a second or two. aot_eager stops short of generating code: it needs no
    # compiler on the machine.
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


def draw(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 96)


@pytest.mark.parametrize("form", ["original", "optimized"])
@every_family
@torch.no_grad()
def test_inference_compiles_at_most_twice_over_batch_sizes(family: str, form: str) -> None:
    model, counter = small_model(family), counting_backend()
    compiled = torch.compile(
        lightspine.optimize(model) if form == "optimized" else model, fullgraph=True, backend=counter
    )
    for batch in BATCHES:
        images = draw(batch)
        assert relative_l2(compiled(images), model(images)) < 1e-5
    assert counter.frame_count <= 2


def logits_and_gradients(run: nn.Module, model: nn.Module, images: Tensor) -> list[Tensor]:
    logits = run(images)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


@every_family
def test_training_compiles_at_most_twice_over_batch_sizes(family: str) -> None:
    model, counter = small_model(family).train(), counting_backend()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # A BatchNorm of pooled features has no statistics of one image.
    for batch in BATCHES[1:]:
        images = draw(batch)
        actual = logits_and_gradients(compiled, model, images)
        expected = logits_and_gradients(eager, eager, images)
        assert len(actual) == len(expected) > 10
        largest = max(float(tensor.norm()) for tensor in expected)
        for ours, theirs in zip(actual, expected, strict=True):
            # Gradients that cancel, as those of a shift before a BatchNorm, are rounding errors.
            assert (ours - theirs).norm() < 1e-4 * theirs.norm() + 1e-6 * largest
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_family
def test_generated_code_of_a_training_step_equals_eager(family: str) -> None:
    model = small_model(family).train()
    eager, images = copy.deepcopy(model), draw(2)
    compiled = torch.compile(model, fullgraph=True)
    actual = logits_and_gradients(compiled, model, images)
    expected = logits_and_gradients(eager, eager, images)
    largest = max(float(tensor.norm()) for tensor in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm() + 1e-5 * largest
