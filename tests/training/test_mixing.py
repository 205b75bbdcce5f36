"""Mixup and CutMix: boxes, shares and targets of the timm versions of the published runs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspine.training.mixing import Mixup, cutmix_box


def fixed_draws(monkeypatch: pytest.MonkeyPatch, *, share: float, center: tuple[int, int] = (0, 0)) -> None:
    """Fix the random share of the first image and the center of the box."""
    centers: Iterator[int] = iter(center)
    monkeypatch.setattr(np.random, "beta", lambda *_: share)
    monkeypatch.setattr(np.random, "randint", lambda *_: next(centers))


def mixed(images: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    mix = Mixup(**{"mixup": 0.0, "cutmix": 0.0, "num_classes": 4} | options)
    return mix(images, torch.arange(len(images)))


def test_box_of_an_odd_side_loses_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    # A side of 224 sqrt(1 - 0.75) = 112 px is even, one of 225 sqrt(0.25) = 112.5, cut to 112, too.
    fixed_draws(monkeypatch, share=0.0, center=(50, 60))
    rows, columns = cutmix_box(100, 100, 1 - 0.33**2)  # 33 x 33 px
    assert (rows.start, rows.stop) == (50 - 16, 50 + 16)
    assert (columns.start, columns.stop) == (60 - 16, 60 + 16)


def test_box_is_clipped_to_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch, share=0.0, center=(2, 95))
    rows, columns = cutmix_box(100, 100, 1 - 0.2**2)  # 20 x 20 px
    assert (rows.start, rows.stop, columns.start, columns.stop) == (0, 12, 85, 100)


def test_cutmix_pastes_the_box_and_corrects_the_targets_by_its_area(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch, share=1 - 0.5**2, center=(1, 4))
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 8, 8)
    pasted, targets = mixed(images, cutmix=1.0)
    # Rows 0 to 2 and columns 2 to 5 of 4 x 4 px, of which one row is outside the image.
    expected = torch.zeros(8, 8)
    expected[0:3, 2:6] = 1
    assert torch.equal(pasted[0, 0], expected)
    assert torch.equal(pasted[1, 0], 1 - expected)
    share = 1 - 12 / 64
    assert targets[0].tolist() == pytest.approx([share, 1 - share, 0, 0])
    assert targets[1].tolist() == pytest.approx([1 - share, share, 0, 0])


def test_mixup_blends_with_the_reversed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch, share=0.3)
    images = torch.randn(4, 3, 8, 8)
    blended, targets = mixed(images, mixup=0.8, label_smoothing=0.1)
    torch.testing.assert_close(blended, 0.3 * images + 0.7 * images.flip(0))
    low, high = 0.1 / 4, 0.9 + 0.1 / 4
    first = [0.3 * high + 0.7 * low, low, low, 0.3 * low + 0.7 * high]
    assert targets[0].tolist() == pytest.approx(first)


def test_uint8_images_are_blended_with_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch, share=0.25)
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8)
    blended, _ = mixed(images, mixup=0.8)
    assert blended.dtype == torch.uint8
    assert blended[:, 0, 0, 0].tolist() == [191, 64]  # 191.25 and 63.75


def test_batch_is_mixed_with_the_given_probability() -> None:
    np.random.seed(0)
    images = torch.randn(2, 3, 8, 8)
    mix = Mixup(0.8, 1.0, prob=0.25, num_classes=2)
    kept = sum(torch.equal(mix(images, torch.arange(2))[0], images) for _ in range(400))
    assert kept / 400 == pytest.approx(0.75, abs=0.08)


def test_input_is_not_changed() -> None:
    images = torch.randn(2, 3, 8, 8)
    before = images.clone()
    for options in ({"mixup": 0.8}, {"cutmix": 1.0}):
        mixed(images, **options)
    assert torch.equal(images, before)
