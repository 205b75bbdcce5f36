"""Multiply-add (MAC) counts against hand calculation, the official code and published values."""

import pytest
import torch
import torch.nn as nn

import lightspine
from lightspine.benchmark import Macs, count_macs
from lightspine.errors import UsageError
from lightspine.models import get_record

# Convolutions, linear layers and attention, in millions, as measured on the official code.
MEASURED_M = {
    "efficientvim_m1": 236.4,
    "efficientvim_m2": 352.2,
    "efficientvim_m3": 651.7,
    "efficientvim_m4": 1105.0,
    "shvit_s1": 241.3,
    "shvit_s2": 365.4,
    "shvit_s3": 600.6,
    "shvit_s4": 986.2,
    "efficientmod_xxs": 579,
    "efficientmod_xs": 773,
    "efficientmod_s": 1402,
    "efficientmod_s_conv": 1471,
}
# Printed with one digit: 0.6 and 0.8 stand for 0.55 to 0.65 and 0.75 to 0.85, which is more than 2 %.
ROUNDED_TO_TENTHS = {"efficientmod_xxs", "efficientmod_xs"}
PUBLISHED = [name for name in lightspine.list_models() if get_record(name).published.macs_g is not None]


def _count(name: str) -> Macs:
    with torch.device("meta"):
        model = lightspine.create_model(name)
    return count_macs(model, get_record(name).input_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_agrees_with_the_published_number(name: str) -> None:
    published = get_record(name).published.macs_g
    assert published is not None
    counted = _count(name).total / 1e9
    if name in ROUNDED_TO_TENTHS:
        assert abs(counted - published) <= 0.05
    else:
        assert counted == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", MEASURED_M)
def test_total_equals_the_measured_number(name: str) -> None:
    counted = _count(name).total / 1e6
    digits = 0 if isinstance(MEASURED_M[name], int) else 1
    assert round(counted, digits) == MEASURED_M[name]


def test_convolution_counts_one_per_multiply_add() -> None:
    # 3 * 3 * 4 inputs for each of 8 channels on a 5 x 6 map.
    model = nn.Conv2d(4, 8, 3, padding=1)
    assert count_macs(model, (4, 5, 6)) == Macs(conv=3 * 3 * 4 * 8 * 5 * 6, matmul=0, scan=0)


def test_grouped_convolution_counts_its_group_only() -> None:
    model = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count_macs(model, (8, 5, 6)).conv == 3 * 3 * 8 * 5 * 6


def test_linear_layer_and_attention_count_as_products() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(self.query(tokens), tokens, tokens)

    # A 6 x 6 matrix for each of 20 tokens, then two products of 20 x 20 x 6.
    assert count_macs(Attention(), (6, 4, 5)) == Macs(conv=0, matmul=20 * 36 + 2 * 20 * 20 * 6, scan=0)


def test_scan_counts_nine_per_channel_and_state() -> None:
    class Scan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            u = x.flatten(2)
            states = u[:, :2]
            A = torch.zeros(u.shape[1], 2, device=u.device)
            return lightspine.selective_scan(
                u, u, A, states, states, torch.zeros(u.shape[1], device=u.device)
            )

    # 4 channels, 30 positions, 2 states, and the skip.
    assert count_macs(Scan(), (4, 5, 6)) == Macs(conv=0, matmul=0, scan=9 * 30 * 4 * 2 + 30 * 4)


def test_norms_and_activations_count_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GELU(), nn.AdaptiveAvgPool2d(1))
    assert count_macs(model, (3, 8, 8)).total == 0


def test_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, (3, 8, 8))
    assert (model.training, model[1].training) == (True, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("input_size", [(224, 224), (3, 0, 8), ()])
def test_wrong_input_size_is_refused(input_size: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="all positive, got"):
        count_macs(nn.Identity(), input_size)  # type: ignore[arg-type]
