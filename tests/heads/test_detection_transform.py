import pytest
import torch

from lightspine.errors import UsageError
from lightspine.heads.detection_transform import DetectionTransform, paste_masks


def make_transform(**options):
    black, white = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return DetectionTransform(black, white, num_classes=1, masks=False, **options).eval()


@pytest.mark.parametrize(
    ("image", "nearest", "down"),
    [
        # 800 / 480 * 640 = 1066.67
        ((480, 640), (800, 1067), (800, 1066)),
        ((427, 640), (800, 1199), (800, 1199)),
        ((500, 333), (1201, 800), (1201, 800)),
        ((375, 500), (800, 1067), (800, 1066)),
        ((200, 800), (333, 1333), (333, 1333)),
    ],
)
def test_sides_are_rounded_to_the_nearest_integer_or_down(image, nearest, down):
    for rounding, expected in (("nearest", nearest), ("down", down)):
        transform = make_transform(resize=(800, 1333), rounding=rounding)
        assert transform([torch.zeros(3, *image)])[0].image_sizes == [expected]


def test_resized_pixels_are_whole_8_bit_values():
    image = torch.randint(0, 256, (3, 30, 41)) / 255
    resized = make_transform(resize=(64, 100))([image])[0].tensors * 255
    torch.testing.assert_close(resized, resized.round(), rtol=0, atol=1e-4)


def test_an_image_that_has_the_size_already_is_not_changed():
    image = torch.rand(3, 64, 96)
    assert torch.equal(make_transform(resize=(64, 100))([image])[0].tensors[0], image)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(UsageError, match="must be 'nearest' or 'down', got 'up'"):
        make_transform(resize=None, rounding="up")


def test_mask_of_ones_holds_the_pixels_whose_centres_are_in_the_box():
    boxes = torch.tensor([[10.4, 20.6, 30.7, 41.2], [-5.0, -3.0, 8.2, 6.0], [40.0, 30.0, 99.0, 99.0]])
    pasted = paste_masks(torch.ones(3, 1, 28, 28), boxes, (48, 64))
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for mask, (left, top, right, bottom) in zip(pasted[:, 0], boxes, strict=True):
        inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        assert torch.equal(mask >= 0.5, inside)


def test_pasted_mask_has_the_orientation_of_the_small_one():
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, 0, 3] = 1  # top right
    pasted = paste_masks(mask, torch.tensor([[8.0, 4.0, 24.0, 20.0]]), (32, 32))[0, 0]
    y, x = (pasted > 0.7).nonzero().float().mean(0).tolist()
    assert abs(y + 0.5 - 6) < 1
    assert abs(x + 0.5 - 22) < 1


def test_box_outside_the_image_leaves_an_empty_mask():
    boxes = torch.tensor([[70.0, 5.0, 80.0, 15.0], [5.0, 5.0, 5.0, 9.0]])
    assert paste_masks(torch.ones(2, 1, 28, 28), boxes, (32, 64)).sum() == 0
