"""Activation recomputation for scans: same values, less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightspine
from lightspine.benchmark.saved_activations import count_saved_bytes
from lightspine.blocks import SS2D, VimMixer
from lightspine.layers.checkpointing import checkpoint_scan
from lightspine.ops.selective_scan import scan
from support.scans import FAST_BACKENDS, convert, scan_inputs

DIM, TOKENS = 32, 35
# Partitions forward and backward like the default backend, without compiling them.
BACKEND = "aot_eager_decomp_partition"
MODULES: dict[str, Callable[..., nn.Module]] = {
    "vim-v2": lambda **options: VimMixer(DIM, **options),
    "vim-v1": lambda **options: VimMixer(DIM, directions="v1", **options),
    "vim-one-way": lambda **options: VimMixer(DIM, directions="one-way", **options),
    "ss2d": lambda **options: SS2D(DIM, ssm_ratio=2.0, conv_bias=True, **options),
}
every_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


def pair(build: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return the same module with and without recomputation."""
    recomputing, keeping = build(recompute=True), build(recompute=False)
    keeping.load_state_dict(recomputing.state_dict())
    return recomputing, keeping


def output_and_gradients(module: Callable[..., Any], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if not torch.equal(a, b)] == []


@every_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_equal_to_the_last_bit(build: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    recomputing, keeping = (module.to(dtype) for module in pair(build))
    x = torch.randn(2, DIM, 7, 5, dtype=dtype)
    assert_equal(output_and_gradients(recomputing, x), output_and_gradients(keeping, x))


@every_module
def test_gradients_are_equal_under_autocast(build: Callable[..., nn.Module]) -> None:
    recomputing, keeping = pair(build)
    x = torch.randn(2, DIM, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        recomputed, kept = (output_and_gradients(module, x) for module in (recomputing, keeping))
    assert_equal(recomputed, kept)


@every_module
def test_compiled_in_one_graph_gives_the_same(build: Callable[..., nn.Module]) -> None:
    module = build(recompute=True)
    x = torch.randn(2, DIM, 7, 5)
    expected = output_and_gradients(module, x)
    compiled = output_and_gradients(torch.compile(module, fullgraph=True, backend=BACKEND), x)
    torch._dynamo.reset()
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_every_backend_gives_equal_gradients(backend: str) -> None:
    u, *rest = convert(scan_inputs(), torch.float32)
    u.requires_grad_()

    def run(u: Tensor) -> Tensor:
        return scan(torch.nn.functional.silu(u), *rest, True, False, backend, save_states=False)

    results = [torch.autograd.grad(out.sum(), u)[0] for out in (run(u), checkpoint_scan(run, u))]
    assert torch.equal(*results)


def saved_per_token(module: nn.Module) -> float:
    """Return the number of float32 values per token saved for the backward pass."""
    return count_saved_bytes(module, torch.randn(1, DIM, 5, 7).requires_grad_()) / 4 / TOKENS


def test_mixer_keeps_its_input_and_gate_only() -> None:
    # Inner width 64: x and z for both directions, and the input of out_proj.
    kept = saved_per_token(VimMixer(DIM, layout="NCHW"))
    assert kept == 2 * 64 + 64


@pytest.mark.parametrize(("directions", "ways"), [("v2", 2), ("v1", 1), ("one-way", 1)])
def test_mixer_saves_all_that_it_computes_again(directions: str, ways: int) -> None:
    recomputing, keeping = pair(lambda **options: VimMixer(DIM, directions=directions, **options))
    # Per way: output of the convolution, of SiLU, of x_proj (rank 2, B and C of 16) and the steps.
    again = ways * (64 + 64 + (2 + 16 + 16) + 64)
    assert saved_per_token(recomputing) <= saved_per_token(keeping) - again


def test_ss2d_saves_all_that_it_computes_again() -> None:
    recomputing, keeping = pair(lambda **options: SS2D(DIM, **options))
    # Convolution, SiLU, four directions' x_proj (rank 2, B and C of 1) and steps.
    again = 32 + 32 + 4 * (2 + 1 + 1) + 4 * 32
    assert saved_per_token(recomputing) <= saved_per_token(keeping) - again


def test_model_with_checkpointed_blocks_gives_the_same_gradients() -> None:
    settings = {"dim": 32, "depth": 2, "num_classes": 10, "img_size": 64}
    model = lightspine.create_model("vim_tiny", **settings).train()
    images = torch.randn(2, 3, 64, 64)
    expected = output_and_gradients(model, images)
    model.set_grad_checkpointing()
    assert_equal(output_and_gradients(model, images), expected)


def test_switch_reaches_every_mixer_of_a_model() -> None:
    settings = {"dim": 32, "depth": 2, "num_classes": 10, "img_size": 64}
    images = torch.randn(1, 3, 64, 64)
    for directions in ("v2", "v1", "one-way", "layer-pairs"):
        kept, recomputed = (
            count_saved_bytes(
                lightspine.create_model("vim_tiny", directions=directions, recompute=switch, **settings),
                images,
            )
            for switch in (False, True)
        )
        assert recomputed < 0.6 * kept, directions


def test_switch_of_vmamba_lowers_what_is_kept() -> None:
    settings = {"embed_dims": (16, 32), "depths": (1, 1), "num_classes": 10}
    images = torch.randn(1, 3, 64, 64)
    kept, recomputed = (
        count_saved_bytes(lightspine.create_model("vmamba_tiny", ssm_recompute=switch, **settings), images)
        for switch in (False, True)
    )
    assert recomputed < 0.9 * kept


def test_gradient_that_needs_the_value_of_a_scan_is_nan() -> None:
    """Misuse of `checkpoint_scan` gives NaN, because a wrong finite gradient would go unnoticed."""
    u, *rest = convert(scan_inputs(), torch.float32)
    u.requires_grad_()
    checkpoint_scan(lambda u: scan(u * 2, *rest, save_states=False).square(), u).sum().backward()
    assert u.grad is not None
    assert u.grad.isnan().all()


def test_nothing_is_kept_where_no_gradient_is_recorded() -> None:
    module = VimMixer(DIM)
    with torch.no_grad():
        out = module(torch.randn(1, DIM, 5, 7))
    assert out.grad_fn is None
