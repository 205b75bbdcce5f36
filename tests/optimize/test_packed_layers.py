"""Layers with weights prepacked for oneDNN."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightspine.errors import UsageError
from lightspine.optimize.packed import PackedConv2d, PackedLinear, packing_available
from support.reference import relative_l2

TOLERANCE = 2e-6
ACTIVATIONS = [nn.Identity(), nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.GELU()]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40).requires_grad_(False)


def conv(**options: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, 3, **({"padding": 1} | options)).requires_grad_(False)


@pytest.mark.parametrize("count", [5, 50], ids=["small", "large"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@torch.inference_mode()
def test_linear_map_and_its_activation_keep_their_values(activation: nn.Module, count: int) -> None:
    layer, x = linear(), torch.randn(2, count, 7, 24)
    assert relative_l2(PackedLinear(layer, activation)(x), activation(layer(x))) < TOLERANCE


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@torch.inference_mode()
def test_convolution_and_its_activation_keep_their_values(activation: nn.Module) -> None:
    layer, x = conv(stride=2), torch.randn(2, 8, 13, 10)
    assert relative_l2(PackedConv2d(layer, activation)(x), activation(layer(x))) < TOLERANCE


@pytest.mark.parametrize("options", [{"groups": 8}, {"dilation": 2}, {"padding": 0}], ids=str)
@torch.inference_mode()
def test_every_kind_of_convolution_keeps_its_values(options: dict[str, int]) -> None:
    layer, x = conv(**options), torch.randn(1, 8, 9, 11)
    assert relative_l2(PackedConv2d(layer)(x), layer(x)) < TOLERANCE


@torch.inference_mode()
def test_tokens_that_lie_apart_in_memory_keep_their_values() -> None:
    layer, wide = linear(), torch.randn(3, 500, 60)
    x = wide[..., 7:31]
    assert relative_l2(PackedLinear(layer)(x), layer(x)) < TOLERANCE


@torch.inference_mode()
def test_convolution_serves_more_sizes_than_it_remembers() -> None:
    layer = conv()
    packed = PackedConv2d(layer)
    for side in (9, 10, 11, 12, 13, 14, 9):
        x = torch.randn(1, 8, side, 8)
        assert relative_l2(packed(x), layer(x)) < TOLERANCE


@pytest.mark.parametrize("layer", [linear(), conv()], ids=["linear", "conv"])
def test_gradient_of_an_input_passes_through(layer: nn.Linear | nn.Conv2d) -> None:
    packed = PackedLinear(layer) if isinstance(layer, nn.Linear) else PackedConv2d(layer)
    x = torch.randn((2, 8, 5, 24)).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (actual,) = torch.autograd.grad(packed(x).square().sum(), x)
    assert relative_l2(actual, expected) < TOLERANCE


@torch.no_grad()
def test_other_dtype_runs_as_the_plain_layer() -> None:
    packed, x = PackedLinear(linear()).double(), torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(packed(x), F.linear(x, packed.weight, packed.bias))


@torch.inference_mode()
def test_bfloat16_stays_within_its_rounding() -> None:
    layer, x = linear(), torch.randn(3, 24)
    actual = PackedLinear(copy.deepcopy(layer).bfloat16(), nn.GELU())(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert relative_l2(actual.float(), F.gelu(layer(x))) < 1e-2


@pytest.mark.parametrize("layer", [linear(), conv()], ids=["linear", "conv"])
@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copy_gives_the_same(layer: nn.Linear | nn.Conv2d, through) -> None:
    packed = PackedLinear(layer) if isinstance(layer, nn.Linear) else PackedConv2d(layer)
    x = torch.randn(2, 8, 25, 24)
    assert torch.equal(through(packed)(x), packed(x))


@torch.no_grad()
def test_loaded_weights_are_packed_anew() -> None:
    packed, x = PackedLinear(linear()), torch.randn(300, 24)
    expected = -packed(x)
    packed.load_state_dict({key: -value for key, value in packed.state_dict().items()})
    assert torch.equal(packed(x), expected)


def test_activation_that_cannot_be_fused_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected an activation of .*GELU, got Tanh\(\)"):
        PackedLinear(linear(), nn.Tanh())


def test_padding_that_is_not_zeros_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a convolution padded with a number of zeros"):
        PackedConv2d(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))


def test_layer_says_whether_it_is_packed() -> None:
    assert f"packed={packing_available()[0]}" in repr(PackedLinear(linear()))
    assert "packed=False" in repr(PackedLinear(linear()).double())


def test_many_threads_share_a_convolution_with_changing_sizes() -> None:
    layer = PackedConv2d(conv())
    images = [torch.randn(1, 8, 9 + size, 20 - size) for size in range(9)]
    with torch.inference_mode():
        expected = [layer(x) for x in images]

    def work(seed: int) -> bool:
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).tolist() * 20
        # Every thread has an inference mode of its own.
        with torch.inference_mode():
            return all(torch.equal(layer(images[i]), expected[i]) for i in order)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
