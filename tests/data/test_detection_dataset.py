"""DetectionDataset: images with boxes, labels and masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from lightspine.data.detection import (
    DetectionDataset,
    collate_detection,
    create_detection_transform,
    select_for_training,
    select_images,
)
from lightspine.data.loader import SeededDataset
from lightspine.errors import UsageError
from support.coco import read_small, real_annotations, square
from support.images import truncate, write_image

CROWD = {"iscrowd": 1, "segmentation": {"size": [48, 64], "counts": [0, 48 * 64]}}


def test_item_of_a_square_is_a_target_of_torchvision(tmp_path: Path) -> None:
    image, target, bad = DetectionDataset(read_small(tmp_path, square()))[0]
    assert image is not None
    assert (image.shape, image.dtype, bad) == ((3, 48, 64), torch.float32, ())
    assert 0 <= image.min() < image.max() <= 1
    assert target["boxes"].tolist() == [[10, 10, 30, 30]]
    assert target["labels"].tolist() == [2]
    assert (int(target["image_id"]), target["area"].tolist(), target["iscrowd"].tolist()) == (1, [400], [0])
    assert int(target["masks"].sum()) == 400
    assert {type(value) for value in target.values()} == {torch.Tensor}


def test_item_without_objects_has_empty_parts(tmp_path: Path) -> None:
    _, target, _ = DetectionDataset(read_small(tmp_path, square(image_id=2), images=2))[0]
    assert (target["boxes"].shape, target["masks"].shape) == ((0, 4), (0, 48, 64))


def test_item_of_a_file_read_without_masks_has_none(tmp_path: Path) -> None:
    assert "masks" not in DetectionDataset(read_small(tmp_path, square(), masks=False))[0].target


def test_item_of_a_flipped_image_has_its_objects_flipped(tmp_path: Path) -> None:
    dataset = DetectionDataset(read_small(tmp_path, square()), v2.RandomHorizontalFlip(1.0))
    _, target, _ = dataset[0]
    assert target["boxes"].tolist() == [[34, 10, 54, 30]]
    assert target["masks"][0, 10:30, 34:54].all()


def test_item_drops_what_a_crop_leaves_outside(tmp_path: Path) -> None:
    other = square(bbox=[40, 30, 10, 10], segmentation=[[40, 30, 50, 30, 50, 40, 40, 40]], category_id=3)
    dataset = DetectionDataset(read_small(tmp_path, square(), other), v2.CenterCrop((48, 20)))
    _, target, _ = dataset[0]
    assert target["boxes"].tolist() == [[0, 10, 8, 30], [18, 30, 20, 40]]
    dataset.min_side = 5
    assert dataset[0].target["labels"].tolist() == [2]


@pytest.mark.parametrize("harm", ["damage", "size", "small", "remove"])
def test_item_of_a_bad_image_is_reported_and_replaced(harm: str, tmp_path: Path) -> None:
    annotations = read_small(tmp_path, square(image_id=2), images=2)
    path = tmp_path / "1.jpg"
    if harm == "damage":
        truncate(path)
    elif harm == "remove":
        path.unlink()
    else:
        write_image(path, (0, 0, 0), size=(48, 64) if harm == "size" else (20, 20))
    item = DetectionDataset(annotations, replace_bad=True)[0]
    assert (int(item.target["image_id"]), [bad.path for bad in item.bad]) == (2, [str(path)])
    assert DetectionDataset(annotations)[0].image is None


def test_item_of_an_image_of_another_size_says_both_sizes(tmp_path: Path) -> None:
    annotations = read_small(tmp_path, square())
    write_image(tmp_path / "1.jpg", (0, 0, 0), size=(48, 64))
    [bad] = DetectionDataset(annotations)[0].bad
    assert bad.reason.endswith("is 48x64 px, but its objects are annotated for 64x48")


def test_select_trained_leaves_out_crowds_and_images_without_objects(tmp_path: Path) -> None:
    entries = [square(image_id=1, **CROWD), square(image_id=2), square(image_id=2, **CROWD)]
    chosen = select_for_training(read_small(tmp_path, *entries, images=3))
    assert (chosen.image_ids.tolist(), chosen.crowd.tolist(), chosen.files[0]) == ([2], [False], "2.jpg")
    assert DetectionDataset(chosen)[0].target["masks"].sum() == 400


def test_select_trained_of_nothing_but_crowds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one image with objects among 1"):
        select_for_training(read_small(tmp_path, square(**CROWD)))


def test_collate_keeps_images_of_different_sizes(tmp_path: Path) -> None:
    annotations = read_small(tmp_path, square(), square(image_id=2), images=3)
    (tmp_path / "3.jpg").unlink()
    dataset = DetectionDataset(annotations, v2.RandomResize(40, 60))
    batch = collate_detection([dataset[i] for i in range(3)])
    assert (len(batch.images), len(batch.targets), len(batch.bad)) == (2, 2, 1)


@pytest.mark.parametrize("augmentation", ["none", "flip", "multi_scale", "large_scale_jitter"])
def test_real_images_of_every_augmentation_are_valid_targets(
    augmentation: Any, tmp_path_factory: Any
) -> None:
    annotations = select_for_training(real_annotations("fixtures_tiny", "coco", tmp_path_factory))
    transform = create_detection_transform(augmentation, shorter=200, longest=333, size=256)
    dataset = SeededDataset(DetectionDataset(annotations, transform), seed=1)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for image, target, _ in (dataset[i] for i in range(len(dataset))):
            height, width = image.shape[1:]
            left, top, right, bottom = target["boxes"].unbind(1)
            assert (left >= 0).all()
            assert (top >= 0).all()
            assert (right <= width).all()
            assert (bottom <= height).all()
            assert ((right - left >= 1) & (bottom - top >= 1)).all()
            assert target["masks"].shape == (len(left), height, width)
            assert len(target["labels"]) == len(target["area"]) == len(left)


def test_seeded_items_repeat_by_epoch_and_differ_between_epochs(tmp_path: Path) -> None:
    transform = create_detection_transform("large_scale_jitter", size=64)
    dataset = SeededDataset(DetectionDataset(read_small(tmp_path, square()), transform), seed=5)
    first, again = dataset[0].image, dataset[0].image
    dataset.set_epoch(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, dataset[0].image)


def test_dataset_of_no_image_is_refused(tmp_path: Path) -> None:
    nothing = select_images(read_small(tmp_path, square()), np.zeros(0, dtype=np.int64))
    with pytest.raises(UsageError, match="at least one image"):
        DetectionDataset(nothing)
