"""Forms that `lightspine.optimize` chooses on a CUDA device, computed on a CPU by the same code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightspine
from lightspine.blocks import EfficientViMBlock, VimMixer
from lightspine.optimize import target, vim
from lightspine.optimize.packed import PackedLinear, PackedPointwise
from support.exporting import FAMILIES, disturb, small_model
from support.reference import relative_l2

TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def _cuda_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "on_cuda", lambda _: True)
    monkeypatch.setattr(vim, "runs_on_triton", lambda _: True)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_forms_give_the_same_features_and_logits(family: str) -> None:
    model = small_model(family)
    optimized = lightspine.optimize(model)
    for size in ((2, 3, 64, 96), (1, 3, 37, 64)):
        images = torch.randn(size)
        assert relative_l2(optimized(images), model(images)) < TOLERANCE
        assert relative_l2(optimized.forward_features(images), model.forward_features(images)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_forms_change_neither_the_images_nor_the_maps_that_they_return(family: str) -> None:
    optimized, images = lightspine.optimize(small_model(family)), torch.randn(2, 3, 64, 64)
    before = images.clone()
    last, maps = optimized.forward_intermediates(images)
    kept = [value.clone() for value in (last, *maps)]
    optimized.forward_head(last)
    assert torch.equal(images, before)
    assert all(torch.equal(value, copy) for value, copy in zip((last, *maps), kept, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_pass_the_same_gradient_to_the_images(family: str) -> None:
    model, images = small_model(family), torch.randn(1, 3, 64, 64, requires_grad=True)
    gradients = [
        torch.autograd.grad(run(images).square().sum(), images)[0]
        for run in (model, lightspine.optimize(model))
    ]
    assert relative_l2(gradients[1], gradients[0]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_forms_take_an_empty_batch(family: str, dtype: torch.dtype) -> None:
    optimized = lightspine.optimize(small_model(family).to(dtype))
    assert optimized(torch.zeros(0, 3, 64, 96, dtype=dtype)).shape == (0, 1000)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_forms_give_the_same_logits_under_autocast(family: str) -> None:
    model, images = small_model(family), torch.randn(2, 3, 64, 96)
    expected = model(images)
    optimized = lightspine.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(optimized(images).float(), expected) < 0.02


@pytest.mark.parametrize("family", ["vmamba", "vim"])
def test_parameters_of_the_scans_are_stored_in_the_dtype_of_the_state(family: str) -> None:
    optimized = lightspine.optimize(small_model(family).bfloat16())
    scanned = {
        name: tensor.dtype
        for name, tensor in (*optimized.named_parameters(), *optimized.named_buffers())
        if name.rpartition(".")[2] in ("A", "D", "dt_bias")
    }
    assert len(scanned) >= 6
    assert set(scanned.values()) == {torch.float32}


@torch.inference_mode()
@pytest.mark.parametrize(
    "options", [{"directions": "v1"}, {"directions": "one-way"}, {"layer_scale": 0.3}, {}]
)
def test_every_kind_of_vim_mixer_keeps_its_values(options: dict[str, object]) -> None:
    mixer, x = disturb(VimMixer(16, state_dim=3, **options)), torch.randn(2, 16, 5, 7)
    assert relative_l2(lightspine.optimize(mixer)(x), mixer(x)) < TOLERANCE


@torch.inference_mode()
def test_efficientvim_block_with_the_other_mixer_keeps_its_values() -> None:
    block = disturb(EfficientViMBlock(16, state_dim=5, mixer="nc-ssd", expand=2.0))
    x = torch.randn(2, 16, 5, 7)
    for actual, expected in zip(
        lightspine.optimize(block).forward_with_state(x), block.forward_with_state(x), strict=True
    ):
        assert relative_l2(actual, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_gelu_is_exact_except_in_bfloat16(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the GELU of cuBLAS is an approximation")

    monkeypatch.setattr(torch, "_addmm_activation", refuse)
    linear, x = nn.Linear(8, 16).to(dtype), torch.randn(4, 8).to(dtype)
    assert torch.equal(PackedLinear(linear, nn.GELU())(x), F.gelu(linear(x)))


def test_gelu_by_the_hyperbolic_tangent_differs_by_less_than_the_rounding_of_bfloat16() -> None:
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    exact = F.gelu(x)
    rounded = exact.bfloat16().double()
    assert (F.gelu(x, approximate="tanh") - exact).square().mean() < 0.02 * (rounded - exact).square().mean()


@torch.inference_mode()
def test_pointwise_convolution_of_a_map_that_is_not_channels_last_keeps_its_format() -> None:
    conv, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 5)
    packed = PackedPointwise(conv, nn.ReLU(), keep_layout=True)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        actual, expected = packed(given), conv(given).relu()
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected)


@torch.inference_mode()
def test_shvit_computes_in_channels_last_format() -> None:
    optimized = lightspine.optimize(small_model("shvit"))
    maps = optimized.forward_intermediates(torch.randn(2, 3, 128, 128), intermediates_only=True)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert optimized.stem[1].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forms_compile_in_one_graph_at_most_twice_over_batch_sizes(family: str) -> None:
    # Importing the compiler takes a second or two.
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = small_model(family), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lightspine.optimize(model), fullgraph=True, backend=counter)
    for batch in (1, 2, 3, 5):
        images = torch.randn(batch, 3, 64, 96)
        assert relative_l2(compiled(images), model(images)) < 1e-5
    torch._dynamo.reset()
    assert counter.frame_count <= 2
