"""Launches and bytes of a forward pass on a GPU, counted on fake tensors."""

import pytest
import torch
from torch import nn

import lightspine
from lightspine.benchmark.launches import count_launches
from support.exporting import FAMILIES, small_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts for an H100 where no device is")


def test_launches_and_bytes_follow_from_the_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    report = count_launches(model, (2, 3, 4, 4))
    assert report.total.operators == {"convolution": 2, "relu": 1, "addmm": 1}
    images, maps, logits = 2 * 3 * 16, 2 * 8 * 16, 2 * 5
    convolution = images + 8 * 3 * 9 + maps + (2 * maps + 8)
    linear = maps + 8 * 16 * 5 + 5 + logits
    assert report.total.bytes == 2 * (convolution + 2 * maps + linear)


def test_convolution_of_a_channels_last_map_copies_a_weight_in_another_format() -> None:
    class LastThenConvolve(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.contiguous(memory_format=torch.channels_last))

    conv = LastThenConvolve(4, 6, 3, bias=False).eval()
    copied = count_launches(conv, (2, 4, 8, 8)).total.operators["convolution"]
    stored = count_launches(conv.to(memory_format=torch.channels_last), (2, 4, 8, 8))
    assert (copied, stored.total.operators["convolution"]) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_optimized_copy_launches_fewer_kernels_and_moves_fewer_bytes(family: str) -> None:
    model = small_model(family)
    eager = count_launches(model, (8, 3, 64, 64))
    optimized = count_launches(model, (8, 3, 64, 64), transform=lightspine.optimize)
    assert optimized.total.launches < 0.9 * eager.total.launches
    assert eager.block_counts == optimized.block_counts
    for stage, traffic in eager.blocks.items():
        assert 0 < optimized.blocks[stage].launches < traffic.launches
        assert 0 < optimized.blocks[stage].bytes < traffic.bytes


def test_attention_of_the_optimized_efficientmod_is_one_launch() -> None:
    report = count_launches(small_model("efficientmod"), (8, 3, 64, 64), transform=lightspine.optimize)
    blocks = sum(count for name, count in report.total.operators.items() if "attention" in name)
    assert blocks > 0
    assert "_softmax" not in report.total.operators


def test_counting_changes_nothing() -> None:
    model = small_model("shvit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_launches(model, (1, 3, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(torch.randn(1, 3, 64, 64)).device.type == "cpu"
