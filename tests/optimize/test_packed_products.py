"""Packed 1x1 convolutions, fused add and multiply, and layer sequences against the plain layers."""

import copy
import io

import pytest
import torch
from timm.layers import SqueezeExcite
from torch import nn

import lightspine
from lightspine.errors import UsageError
from lightspine.optimize.packed import (
    PackedBinaryLinear,
    PackedPointwise,
    pack_sequence,
    packing_available,
)
from support.exporting import disturb, small_model
from support.reference import relative_l2

FAMILIES = ["efficientvim", "shvit", "efficientmod"]
# Sums in another order, and oneDNN's own error function.
TOLERANCE = 1e-6


@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.GELU(), nn.Sigmoid()], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(5, 3), (23, 21)], ids=["small", "large"])
@torch.inference_mode()
def test_packed_pointwise_gives_the_values_of_the_convolution(activation, memory_format, size):
    conv = nn.Conv2d(17, 33, 1)
    x = torch.randn(2, 17, *size).contiguous(memory_format=memory_format)
    other = torch.randn(2, 33, *size)
    expected = conv(x) if activation is None else activation(conv(x))
    packed = PackedPointwise(conv, activation)
    assert relative_l2(packed(x), expected) < TOLERANCE
    assert relative_l2(packed(x, other), expected + other) < TOLERANCE


@pytest.mark.parametrize("size", [(1, 1), (4, 3), (63, 61)], ids=str)
@torch.inference_mode()
def test_packed_pointwise_reads_part_of_the_channels(size):
    conv = nn.Conv2d(6, 9, 1, bias=False)
    x = torch.randn(2, 20, *size).contiguous(memory_format=torch.channels_last)[:, 5:11]
    assert relative_l2(PackedPointwise(conv)(x), conv(x)) < TOLERANCE


@pytest.mark.parametrize("operation", ["add", "mul"])
@pytest.mark.parametrize("count", [5, 500], ids=["small", "large"])
@torch.inference_mode()
def test_combining_linear_adds_or_multiplies(operation, count):
    linear, x, other = nn.Linear(19, 35), torch.randn(2, count, 3, 19), torch.randn(2, count, 3, 35)
    expected = linear(x) + other if operation == "add" else linear(x) * other
    assert relative_l2(PackedBinaryLinear(linear, operation)(x, other), expected) < TOLERANCE


@pytest.mark.skipif(not packing_available()[0], reason=packing_available()[1])
@pytest.mark.parametrize("make", [copy.deepcopy, "pickle"], ids=["copy", "pickle"])
@torch.inference_mode()
def test_copy_of_a_packed_pointwise_is_packed(make):
    packed = PackedPointwise(nn.Conv2d(4, 8, 1))
    if make == "pickle":
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = make(packed)
    x = torch.randn(1, 4, 3, 3)
    assert "packed=True" in repr(other)
    assert torch.equal(other(x), packed(x))


def test_gradients_pass_through_packed_layers():
    pointwise = PackedPointwise(nn.Conv2d(4, 8, 1))
    linear = PackedBinaryLinear(nn.Linear(8, 4), "mul")
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    linear(pointwise(x).permute(0, 2, 3, 1), torch.ones(4)).sum().backward()
    expected = pointwise.weight.flatten(1).T @ linear.weight.sum(0)
    assert relative_l2(x.grad, expected[None, :, None, None].expand_as(x)) < TOLERANCE


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 1, "stride": 2}], ids=str)
def test_convolution_that_is_not_pointwise_is_refused(options):
    with pytest.raises(UsageError, match="expected a 1x1 convolution without groups, stride or padding"):
        PackedPointwise(nn.Conv2d(4, 4, **options))


@torch.inference_mode()
def test_row_of_layers_keeps_its_values():
    row = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()),
        SqueezeExcite(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Tanh(),
        nn.Conv2d(8, 5, 1),
    ).eval()
    x = torch.randn(2, 3, 9, 11)
    packed = lightspine.optimize(pack_sequence(row))
    (squeeze_excite,) = (layer for layer in packed if isinstance(layer, SqueezeExcite))
    assert isinstance(squeeze_excite.fc1, PackedPointwise)
    assert isinstance(squeeze_excite.fc2, PackedPointwise)
    assert relative_l2(packed(x), row(x)) < TOLERANCE


@torch.inference_mode()
def test_squeeze_excite_with_a_second_pool_keeps_its_values():
    row, x = SqueezeExcite(8, add_maxpool=True).eval(), torch.randn(2, 8, 5, 4)
    assert relative_l2(lightspine.optimize(row)(x), row(x)) < TOLERANCE


@pytest.mark.parametrize("optimized", [False, True], ids=["eager", "optimized"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_bfloat16_model_stays_close_to_float32(family, optimized):
    model = small_model(family)
    images = torch.randn(2, 3, 64, 96)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half = lightspine.optimize(half) if optimized else half
    # A bfloat16 has 8 bits: 0.4 % in every rounding, some dozens of them in a row.
    assert relative_l2(half(images.bfloat16()).float(), model(images)) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_optimized_copy_keeps_its_values_under_autocast(family):
    model = small_model(family)
    images = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = lightspine.optimize(model)(images)
    assert relative_l2(logits.float(), model(images)) < 0.05


@torch.inference_mode()
def test_modulation_by_a_sum_keeps_its_values():
    model = disturb(small_model("efficientmod", fusion="sum", depths=(2, 2), context_f=False))
    images = torch.randn(1, 3, 64, 64)
    assert relative_l2(lightspine.optimize(model)(images), model(images)) < 5e-6
