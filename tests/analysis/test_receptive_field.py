"""Effective receptive field: closed forms for convolutions, curves, before and after training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightspine
from lightspine.analysis import erf, open_model
from lightspine.analysis.receptive_field import (
    ErfResult,
    ReceptiveField,
    compute_field,
    contribution_curve,
)
from lightspine.analysis.stages import Stage
from lightspine.errors import UsageError
from lightspine.models.saving import save_checkpoint
from support.images import write_image


def convolution_power(kernel: np.ndarray, times: int) -> np.ndarray:
    power = np.ones(1)
    for _ in range(times):
        power = np.convolve(power, kernel)
    return power


def linear_stack(depth: int, size: int) -> nn.Module:
    stack = nn.Sequential(*(nn.Conv2d(1, 1, size, padding=size // 2, bias=False) for _ in range(depth)))
    for conv in stack:
        nn.init.ones_(conv.weight)
    return nn.Sequential(stack)


@pytest.mark.parametrize(("depth", "size"), [(1, 3), (3, 3), (2, 5)])
def test_field_of_linear_convolutions_is_the_power_of_their_kernel(depth: int, size: int) -> None:
    line = convolution_power(np.ones(size), depth)
    expected = np.zeros((21, 25))
    reach = len(line) // 2
    expected[10 - reach : 11 + reach, 12 - reach : 13 + reach] = np.outer(line, line)
    inputs = [torch.rand(1, 1, 21, 25) for _ in range(2)]
    field = compute_field(linear_stack(depth, size), Stage(0, "0", 1), inputs)
    np.testing.assert_allclose(field.contribution, expected / expected.sum(), rtol=1e-5, atol=1e-12)


def test_curve_of_linear_convolutions_is_that_of_their_kernel() -> None:
    field = compute_field(linear_stack(2, 3), Stage(0, "0", 1), [torch.rand(1, 1, 9, 9)])
    # The middle of 1 2 3 2 1, its three and its five entries, over both axes.
    shares = (np.array([3, 7, 9]) / 9) ** 2
    np.testing.assert_allclose(field.shares[[0, 2, 4]], shares, rtol=1e-6)
    assert field.center == (4.5, 4.5)
    assert field.side_of(0.5) == 3


def test_strided_map_is_centred_on_the_patch_of_its_central_position() -> None:
    patches = nn.Sequential(nn.Conv2d(1, 1, 4, 4, bias=False))
    nn.init.ones_(patches[0].weight)
    field = compute_field(patches, Stage(0, "0", 1), [torch.rand(1, 1, 16, 12)])
    assert field.center == (10, 6)
    assert field.side_of(0.99) == 4


def test_curve_ends_at_everything_off_the_middle() -> None:
    contribution = np.random.default_rng(0).random((5, 7))
    sides, shares = contribution_curve(contribution, (0.5, 0.5))
    assert sides[0] == 1
    assert shares[0] == pytest.approx(contribution[0, 0] / contribution.sum())
    assert shares[-1] == pytest.approx(1)
    assert (np.diff(shares) >= 0).all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = lightspine.create_model("vmamba_tiny", depths=[1, 1], embed_dims=[8, 16], num_classes=3)
    return save_checkpoint(model, tmp_path_factory.mktemp("erf") / "small.safetensors")


def test_checkpoint_is_shown_before_and_after_training(checkpoint: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", (9, 99, 200), size=(61, 45))
    result = erf(open_model(checkpoint, size=(40, 56)), [image])
    assert [field.state for field in result.fields] == ["untrained", "trained"]
    before, after = (field.contribution for field in result.fields)
    assert before.shape == after.shape == (40, 56)
    assert not np.allclose(before, after)
    assert set(result.arrays()) >= {"untrained_shares", "trained_contribution"}


def test_name_without_checkpoint_is_shown_untrained_only(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", (9, 99, 200))
    result = erf(open_model("shvit_s1", size=64), [image], stage=0)
    assert [field.state for field in result.fields] == ["untrained"]
    assert result.module == "stages.0"


def test_images_of_different_native_sizes_are_refused(tmp_path: Path) -> None:
    images = [write_image(tmp_path / f"{side}.png", (9, 99, 200), size=(side, 40)) for side in (40, 50)]
    with pytest.raises(UsageError, match="images of one size to average over, got 40x40, 40x50"):
        erf(open_model("shvit_s1", size="native"), images)


def test_map_without_a_center_is_refused(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", (9, 99, 200), size=(96, 96))
    message = "expected a map of at least 3 x 3 positions, got 2 x 2 of .* for images of 96 x 96 px"
    with pytest.raises(UsageError, match=message):
        erf(open_model("shvit_s1", size=96), [image])


def test_square_is_drawn_inside_the_image() -> None:
    # All of the contribution is in a corner, and the center is off the middle, as with an even map.
    contribution = np.zeros((64, 64))
    contribution[0, 0] = 1.0
    center = (40.0, 40.0)
    field = ReceptiveField("trained", contribution, center, *contribution_curve(contribution, center))
    axes = ErfResult("model", "stages.3", 1, [field]).figure().axes[0]
    [square] = axes.patches
    assert (square.get_x(), square.get_y()) == (0, 0)
    assert (square.get_width(), square.get_height()) == (64, 64)
