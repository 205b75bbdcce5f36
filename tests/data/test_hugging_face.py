"""Hugging Face datasets on disk."""

import io
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from lightspine.data import load_hugging_face
from lightspine.data.modules import HuggingFaceDataModule
from lightspine.errors import LightspineError, UsageError

COLOURS = {"red": (200, 10, 10), "blue": (10, 10, 200)}


def _save(folder: Path, *splits: str) -> Path:
    pictures = {name: Image.new("RGB", (40, 40), colour) for name, colour in COLOURS.items()}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])}
    )
    rows = {"image": [pictures["red"], pictures["blue"]] * 4, "label": ["red", "blue"] * 4}
    split = datasets.Dataset.from_dict(rows, features=features)
    (datasets.DatasetDict(dict.fromkeys(splits, split)) if splits else split).save_to_disk(str(folder))
    return folder


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An entry of None makes the import fail.
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"package datasets .* not installed"):
        load_hugging_face(tmp_path)


def test_splits_become_batches(tmp_path: Path) -> None:
    data = HuggingFaceDataModule(
        _save(tmp_path / "saved", "train", "test"),
        image_size=32,
        batch_size=8,
        augmentation="none",
        num_workers=0,
    )
    assert data.class_names == ["red", "blue"]
    (batch,) = data.val_dataloader()
    assert batch.labels.tolist() == [0, 1] * 4
    assert (batch.images[:, 0].mean(dim=(1, 2)) > 0).tolist() == [True, False] * 4


def test_corrupt_row_is_named(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40)).save(stream, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": stream.getvalue()}, {"bytes": b"no image"}], "label": [0, 1]}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=split, val=split).save_to_disk(str(tmp_path / "saved"))
    data = HuggingFaceDataModule(tmp_path / "saved", image_size=32, num_workers=0)
    with pytest.raises(LightspineError, match=r"\(val\), row 1: it is not an image"):
        data.val_source.open(1)
    assert [data.val_source.read(row) for row in range(2)] == [stream.getvalue(), b"no image"]


def test_missing_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"split val in .* which has train"):
        HuggingFaceDataModule(_save(tmp_path / "saved", "train"))


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"column picture in .* which has image, label"):
        HuggingFaceDataModule(_save(tmp_path / "saved", "train", "val"), image_column="picture")


def test_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match="cannot load the dataset"):
        load_hugging_face(tmp_path)
