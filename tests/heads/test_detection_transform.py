import torch

from lightspine.heads.detection_transform import paste_masks


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
