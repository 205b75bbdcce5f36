"""Whole models with scans: same training on every backend, and full-graph compilation."""

import functools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightspine
from lightspine.models import vim, vmamba

VMAMBA = {"embed_dims": (8, 16), "depths": (1, 1), "mlp_ratio": 2.0}
VIM = {"dim": 32, "depth": 2, "patch_size": 8, "stride": 8, "img_size": 32}
SMALL = {"vmamba_tiny": VMAMBA, "vim_tiny": VIM}
every_model = pytest.mark.parametrize("name", SMALL)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lightspine.create_model(name, num_classes=5, **SMALL[name])


def train(name: str, steps: int, device: str = "cpu") -> Tensor:
    """Return the losses of a short training run on separable images."""
    model = build(name).to(device)
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(10) % 5
    images = torch.randn(10, 3, 32, 32, generator=draw) + labels[:, None, None, None]
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return torch.stack(losses)


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(backend: str) -> None:
        for module, function in ((vim, "scan"), (vmamba, "cross_scan")):
            fixed = functools.partial(getattr(module, function), backend=backend)
            monkeypatch.setattr(module, function, fixed)

    return use


@every_model
@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "torch"])
def test_fifty_steps_of_training_give_the_same_losses_on_every_backend(
    name: str, backend: str, use_backend: Any
) -> None:
    expected = train(name, 50)
    use_backend(backend)
    actual = train(name, 50)
    assert expected[-1] < 0.5 * expected[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@every_model
def test_fifty_steps_of_training_give_the_same_losses_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.testing.assert_close(train(name, 50, "cuda"), train(name, 50), rtol=1e-3, atol=1e-4)


def results(model: nn.Module, images: Tensor) -> list[Tensor]:
    out = model(images)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


# PyTorch 2.11 uses what it has deprecated itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_model
def test_model_compiled_in_one_graph_equals_eager(name: str) -> None:
    model, images = build(name), torch.randn(2, 3, 32, 32)
    # aot_eager_decomp_partition stops short of generating code: it needs no compiler on the machine.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    for actual, expected in zip(results(compiled, images), results(model, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_model
def test_model_compiled_by_inductor_equals_eager(name: str) -> None:
    model, images = build(name), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    for actual, expected in zip(results(compiled, images), results(model, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_model
def test_exported_model_has_one_node_per_scan(name: str) -> None:
    program = torch.export.export(build(name).eval(), (torch.randn(2, 3, 32, 32),))
    operators = [str(node.target) for node in program.graph.nodes if "lightspine." in str(node.target)]
    assert (
        operators
        == {
            "vmamba_tiny": ["lightspine.cross_scan.default"] * 2,
            "vim_tiny": ["lightspine.selective_scan.default"] * 4,
        }[name]
    )
