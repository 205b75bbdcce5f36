"""Detection augmentation, as published."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.detection import (
    LargeScaleJitter,
    RandomSizedCrop,
    ResizeShorterSide,
    create_detection_transform,
)
from lightspine.errors import UsageError


def _sample(height: int, width: int, *, box: tuple[int, int, int, int] = (8, 4, 24, 20)) -> tuple[Any, Any]:
    left, top, right, bottom = box
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([box], dtype=torch.float32), format="XYXY", canvas_size=(height, width)
    )
    # The object is white, so that its pixels tell where it went.
    image = tv_tensors.Image(255 * mask.expand(3, -1, -1))
    return image, {"boxes": boxes, "masks": tv_tensors.Mask(mask), "labels": torch.tensor([1])}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 427), (1199, 800)),
        ((300, 1000), (400, 1333)),
        ((427, 640), (800, 1199)),
    ],
)
def test_resize_shorter_side_gives_the_published_sizes(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    image, target = ResizeShorterSide((800,), 1333)(*_sample(*size))
    assert image.shape[1:] == target["masks"].shape[1:] == target["boxes"].canvas_size == expected


def test_resize_shorter_side_draws_all_sizes() -> None:
    resize = ResizeShorterSide((32, 40, 48), 100)
    assert {resize(*_sample(50, 60))[0].shape[1] for _ in range(40)} == {32, 40, 48}


def test_random_sized_crop_stays_within_its_bounds() -> None:
    crop = RandomSizedCrop(20, 30)
    sizes = [tuple(crop(*_sample(25, 60))[0].shape[1:]) for _ in range(60)]
    assert {height for height, _ in sizes} == set(range(20, 26))
    assert {width for _, width in sizes} == set(range(20, 31))


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 2.0])
def test_large_scale_jitter_moves_image_mask_and_box_alike(scale: float) -> None:
    jitter = LargeScaleJitter(96, (scale, scale))
    image, target = jitter(*_sample(40, 64, box=(8, 4, 56, 36)))
    mask = target["masks"][0].as_subclass(Tensor)
    assert image.shape == (3, 96, 96)
    shown = image[0].as_subclass(Tensor)
    height, width = (min(round(side * scale * 96 / 64), 96) for side in (40, 64))
    # Image and mask agree except at the border of the object.
    differing = (shown[:height, :width] > 127) != mask[:height, :width].bool()
    assert differing.float().mean() < 0.12
    rows, columns = mask.nonzero(as_tuple=True)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert target["boxes"][0].tolist() == [float(side) for side in expected]


def test_large_scale_jitter_picks_the_pixels_of_a_resized_mask() -> None:
    jitter = LargeScaleJitter(100, (1.7, 1.7))
    mask = tv_tensors.Mask(torch.randint(0, 2, (3, 57, 91), dtype=torch.uint8))
    params = jitter.make_params([mask])
    plain = mask.as_subclass(Tensor)
    resized = torch.nn.functional.interpolate(plain[None], params["resized"], mode="nearest-exact")[0]
    expected = F.crop(resized, params["top"], params["left"], 100, 100)
    picked = jitter.transform(mask, params).as_subclass(Tensor)
    height = min(params["resized"][0], 100)
    assert torch.equal(picked[:, :height], expected[:, :height])


def test_large_scale_jitter_fills_a_small_image_with_grey() -> None:
    image, target = LargeScaleJitter(64, (0.5, 0.5))(*_sample(40, 64))
    assert (image[:, 20:] == 128).all()
    assert (image[:, :, 32:] == 128).all()
    assert not target["masks"][:, 20:].any()


def test_multi_scale_gives_sizes_of_both_branches() -> None:
    transform = create_detection_transform("multi_scale", shorter=80, longest=133)
    sizes = [tuple(transform(*_sample(48, 64))[0].shape[1:]) for _ in range(80)]
    assert {min(size) for size in sizes} <= {side // 10 for side in range(0, 810)}
    assert max(max(size) for size in sizes) <= 133
    ratios = {round(width / height, 1) for height, width in sizes}
    assert len(ratios) > 3, "a crop changes the ratio"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ResizeShorterSide((), 100),
        lambda: ResizeShorterSide((0,), 100),
        lambda: RandomSizedCrop(5, 4),
        lambda: LargeScaleJitter(0),
        lambda: LargeScaleJitter(64, (2.0, 0.1)),
        lambda: create_detection_transform("mosaic"),
    ],
)
def test_transform_with_a_value_out_of_range_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        wrong()
