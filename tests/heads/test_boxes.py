"""Box decoding and NMS with the published conventions."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from lightspine.heads import boxes as boxes_module
from lightspine.heads.boxes import ClampedBoxCoder, batched_nms, nonempty_boxes


def random_boxes(count: int) -> torch.Tensor:
    corners = torch.rand(count, 2) * 80
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * 40], dim=1)


def test_a_side_shrinks_and_grows_by_the_same_largest_factor():
    box = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    coder = ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))
    shrunk, grown = (coder.decode_single(torch.tensor([[0.0, 0.0, d, d]]), box)[0] for d in (-9.0, 9.0))
    torch.testing.assert_close(shrunk[2] - shrunk[0], torch.tensor(1000 * 16 / 1000))
    torch.testing.assert_close(grown[2] - grown[0], torch.tensor(1000 * 1000 / 16))


def test_the_limit_of_weighted_offsets_is_that_of_the_sides():
    box = torch.tensor([[0.0, 0.0, 100.0, 100.0]])
    offset = -math.log(1000 / 16) * 5 - 1
    decoded = ClampedBoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(torch.tensor([[0, 0, offset, 0]]), box)
    torch.testing.assert_close(decoded[0, 2] - decoded[0, 0], torch.tensor(1.6))


def test_usual_offsets_are_decoded_as_by_torchvision():
    offsets, boxes = torch.randn(20, 12), random_boxes(20)
    weights = (10.0, 10.0, 5.0, 5.0)
    expected = BoxCoder(weights).decode_single(offsets, boxes)
    torch.testing.assert_close(ClampedBoxCoder(weights).decode_single(offsets, boxes), expected)


def test_boxes_without_width_or_height_are_empty():
    boxes = torch.tensor([[0.0, 0, 1, 1], [2, 0, 2, 5], [0, 3, 4, 3], [0, 0, 1e-6, 1e-6]])
    assert nonempty_boxes(boxes).tolist() == [True, False, False, True]


@pytest.mark.parametrize("most_shifted", [0, 10_000])
def test_boxes_are_suppressed_by_better_ones_of_their_group_only(monkeypatch, most_shifted):
    monkeypatch.setattr(boxes_module, "_MOST_SHIFTED", most_shifted)
    boxes = random_boxes(300).double()
    scores, groups = torch.rand(300).double(), torch.randint(0, 4, (300,))
    expected = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [kept for kept in expected if groups[kept] == groups[index]]
        sides = (
            boxes[rivals, 2:].minimum(boxes[index, 2:]) - boxes[rivals, :2].maximum(boxes[index, :2])
        ).clamp(min=0)
        common = sides.prod(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        if not len(rivals) or (common / (areas[rivals] + areas[index] - common)).max() <= 0.5:
            expected.append(index)
    assert batched_nms(boxes, scores, groups, 0.5).tolist() == expected


def test_no_box_leaves_none():
    assert batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).shape == (
        0,
    )
