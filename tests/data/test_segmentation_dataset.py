"""SegmentationDataset: images, label maps and unreadable files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightspine.data.loader import SeededDataset
from lightspine.data.segmentation import (
    LabeledImage,
    LabelReader,
    SegmentationDataset,
    collate_segmentation,
    collate_segmentation_lists,
    create_segmentation_eval_transform,
    create_segmentation_transform,
    scan_segmentation_folder,
)
from lightspine.data.transforms import Preprocessing
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import open_image
from support.coco import unpack
from support.images import truncate, write_image

EVAL = create_segmentation_eval_transform(Preprocessing(), scale=None)


def _pair(folder: Path, values: np.ndarray, *, mode: str | None = None, number: int = 0) -> LabeledImage:
    image = write_image(folder / f"{number}.jpg", (90, 60, 200), size=(48, 40))
    path = folder / f"{number}.png"
    drawn = Image.fromarray(values)
    if mode == "P":
        drawn.putpalette([number * 5 % 256 for number in range(768)])
    drawn.save(path)
    return LabeledImage(image, path)


def _values(height: int = 40, width: int = 48) -> np.ndarray:
    return (np.arange(height * width).reshape(height, width) % 3).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "mode"),
    [(_values(), "L"), (_values(), "P"), (_values().astype(np.uint16), "I;16"), (_values() > 0, "1")],
    ids=["grey", "palette", "16-bit", "1-bit"],
)
def test_reader_takes_every_kind_of_file_with_one_value_per_pixel(
    values: np.ndarray, mode: str, tmp_path: Path
) -> None:
    found = LabelReader(3).read(_pair(tmp_path, values, mode=mode).labels)
    assert np.array_equal(found, values)


def test_reader_of_a_file_with_many_values_maps_them(tmp_path: Path) -> None:
    pair = _pair(tmp_path, np.where(_values() == 2, 7000, 300).astype(np.uint16))
    found = LabelReader(2, remap={300: 1, 7000: 255}).read(pair.labels)
    assert np.unique(found).tolist() == [1, 255]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        pytest.param(_values() + np.uint8(9), "hold the value 9, expected 0 to 2 or 255", id="value"),
        pytest.param(np.zeros((40, 48, 3), dtype=np.uint8), "one value per pixel .* mode RGB", id="colours"),
        pytest.param(_values(40, 40), "is 48x40 px, but its labels .* are 40x40", id="size"),
    ],
)
def test_item_with_bad_labels_is_reported(values: np.ndarray, sentence: str, tmp_path: Path) -> None:
    dataset = SegmentationDataset([_pair(tmp_path, values)], LabelReader(3), EVAL)
    [bad] = dataset[0].bad
    with pytest.raises(LightspineError, match=sentence):
        raise LightspineError(bad.reason)


@pytest.mark.parametrize("part", ["image", "labels"])
def test_item_with_a_damaged_file_is_replaced(part: str, tmp_path: Path) -> None:
    pairs = [_pair(tmp_path, _values(), number=number) for number in range(2)]
    truncate(getattr(pairs[0], part))
    item = SegmentationDataset(pairs, LabelReader(3), EVAL, replace_bad=True)[0]
    assert (item.name, len(item.bad)) == (str(pairs[1].image), 1)
    assert SegmentationDataset(pairs, LabelReader(3), EVAL)[0].image is None


def test_real_images_for_training_have_one_size_and_known_labels(tmp_path_factory: Any) -> None:
    splits = scan_segmentation_folder(unpack("fixtures_tiny", tmp_path_factory) / "semantic")
    transform = create_segmentation_transform(Preprocessing(), crop=(96, 128), scale=(512, 128))
    dataset = SeededDataset(SegmentationDataset(splits.train, splits.reader, transform), seed=0)
    batch = collate_segmentation([dataset[i] for i in range(3)])
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 96, 128), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((3, 96, 128), torch.int64)
    assert set(batch.labels.unique().tolist()) <= {*range(133), 255}
    again = collate_segmentation([dataset[i] for i in range(3)])
    assert torch.equal(batch.images, again.images)
    dataset.set_epoch(1)
    assert not torch.equal(batch.images[0], dataset[0].image)


def test_real_images_for_validation_keep_the_size_of_their_labels(tmp_path_factory: Any) -> None:
    splits = scan_segmentation_folder(unpack("fixtures_tiny", tmp_path_factory) / "semantic")
    transform = create_segmentation_eval_transform(Preprocessing(), scale=(512, 128), divisor=32)
    dataset = SegmentationDataset(splits.train + splits.val, splits.reader, transform)
    batch = collate_segmentation_lists([dataset[i] for i in range(4)])
    for image, labels, name in zip(batch.images, batch.labels, batch.names, strict=True):
        assert labels.shape == open_image(name).size[::-1]
        assert all(side % 32 == 0 for side in image.shape[1:])
        assert min(image.shape[1:]) == 128


def test_dataset_without_images_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one image"):
        SegmentationDataset([], LabelReader(3), EVAL)
