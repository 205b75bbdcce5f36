"""RPN: anchors, box clipping and anchor matching."""

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from lightspine.heads.mask_rcnn import RoIPooler
from lightspine.heads.rpn import MinOverlapMatcher, StridedAnchors


def test_anchors_keep_their_stride_on_a_map_that_was_rounded_up():
    anchors = StridedAnchors([64], scales=[8.0], aspect_ratios=[1.0])
    images = ImageList(torch.zeros(1, 3, 800, 800), [(800, 800)])
    (found,) = anchors(images, [torch.zeros(1, 1, 13, 13)])
    centres = (found[:13, :2] + found[:13, 2:]) / 2
    torch.testing.assert_close(centres[:, 0], torch.arange(13) * 64.0)


def test_anchors_have_exact_areas_and_ratios():
    anchors = StridedAnchors([8, 16], scales=[4.0, 4 * 2 ** (1 / 3)])
    images = ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)])
    (found,) = anchors(images, [torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)])
    sides = found[:, 2:] - found[:, :2]
    areas = [32.0**2, 32.0**2 * 2 ** (2 / 3)] * 3
    torch.testing.assert_close(sides.prod(1), torch.tensor(areas + [4 * area for area in areas]))
    ratios = torch.tensor([0.5, 0.5, 1, 1, 2, 2] * 2)
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], ratios)


def test_anchors_of_half_precision_maps_are_in_float32():
    anchors = StridedAnchors([8], scales=[4.0])
    images = ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)])
    (found,) = anchors(images, [torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)])
    assert found.dtype == torch.float32


def test_anchors_of_double_precision_maps_are_added_up_in_float64():
    anchors = StridedAnchors([8], scales=[4 * 2 ** (1 / 3)], aspect_ratios=[0.5])
    images = ImageList(torch.zeros(1, 3, 8, 8000), [(8, 8000)])
    (found,) = anchors(images, [torch.zeros(1, 1, 1, 1000, dtype=torch.float64)])
    sides = found[:, 2:] - found[:, :2]
    assert found.dtype == torch.float64
    torch.testing.assert_close(sides, sides[:1].expand(1000, 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [33, 64, 1000])
def test_crops_read_the_pixel_centres_whatever_the_image_size(size):
    strides = (4, 8)
    # Each map contains the image coordinates of its pixel centers.
    maps = {
        str(s): ((torch.arange(-(-size // s)) + 0.5) * s).expand(1, 1, -(-size // s), -1) for s in strides
    }
    crop = RoIPooler(strides, 2)(maps, [torch.tensor([[6.0, 6.0, 26.0, 26.0]])], [(size, size)])
    torch.testing.assert_close(crop[0, 0, 0], torch.tensor([11.0, 21.0]))


def test_boxes_are_cropped_from_the_level_of_their_size():
    strides = (4, 8, 16, 32)
    maps = {str(s): torch.full((1, 1, 1024 // s, 1024 // s), float(s)) for s in strides}
    sides = [1.0, 111.0, 113.0, 223.0, 225.0, 449.0, 1000.0]
    boxes = torch.tensor([[10.0, 10.0, 10 + side, 10 + side] for side in sides])
    crops = RoIPooler(strides, 1)(maps, [boxes], [(1024, 1024)])
    assert crops.flatten().tolist() == [4, 4, 8, 8, 16, 32, 32]


def test_no_box_at_all_gives_no_crop():
    maps = {"4": torch.zeros(1, 5, 8, 8), "8": torch.zeros(1, 5, 4, 4)}
    assert RoIPooler((4, 8), 7)(maps, [torch.zeros(0, 4)], [(32, 32)]).shape == (0, 5, 7, 7)


@pytest.mark.parametrize(("overlap", "matched"), [(0.31, 0), (0.29, -1)])
def test_low_quality_match_needs_the_minimum_overlap(overlap, matched):
    quality = torch.tensor([[overlap, 0.1]])
    assert MinOverlapMatcher(0.7, 0.3, min_overlap=0.3)(quality)[0] == matched


def test_object_that_no_anchor_overlaps_matches_none():
    assert MinOverlapMatcher(0.7, 0.3, min_overlap=0.0)(torch.zeros(1, 3)).tolist() == [-1, -1, -1]
