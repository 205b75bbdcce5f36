"""A detector overfits one image within seconds."""

import pytest
import torch
from torchvision.ops import box_iou

from lightspine.heads import build_detector
from support.dense import few_proposals, small_backbone


def picture():
    """Return an image with a red ellipse (class 1) and a green rectangle (class 2), and its target."""
    image = torch.rand(3, 96, 128) * 0.2
    boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [60.0, 30.0, 120.0, 84.0]])
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    ellipse = ((x - 30) / 20) ** 2 + ((y - 36) / 24) ** 2 <= 1
    rectangle = (x > 60) & (x < 120) & (y > 30) & (y < 84)
    for mask, colour in ((ellipse, (0.9, 0.1, 0.1)), (rectangle, (0.1, 0.9, 0.1))):
        image[:, mask] = torch.tensor(colour)[:, None]
    masks = torch.stack([ellipse, rectangle]).to(torch.uint8)
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels", "steps"),
    [("retinanet", 128, 100), ("mask_rcnn", 64, 100), ("cascade_mask_rcnn", 64, 50)],
)
def test_detector_learns_one_picture_by_heart(name, channels, steps):
    image, target = picture()
    detector = build_detector(name, small_backbone("efficientmod"), 2, channels=channels, resize=None)
    few_proposals(detector, 20)
    if name != "retinanet":
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 20
    optimizer = torch.optim.AdamW(detector.train().parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(detector([image], [target]).values()).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        found = detector.eval()([image])[0]
    for i in range(2):
        is_class = found["labels"] == target["labels"][i]
        assert is_class.any()
        best = torch.where(is_class)[0][0]  # the first has the highest score
        assert box_iou(found["boxes"][best, None], target["boxes"][i, None]) > 0.7
        if "masks" in found:
            mask, wanted = found["masks"][best, 0] >= 0.5, target["masks"][i] > 0
            assert (mask & wanted).sum() / (mask | wanted).sum() > 0.7
