"""Image folder datasets: classes, splits and unreadable images."""

import re
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightspine.data import (
    ImageFolderDataset,
    Preprocessing,
    collate_images,
    create_eval_transform,
    list_images,
    scan_image_folder,
)
from lightspine.errors import UsageError
from support.images import shared_archive, truncate, write_folder, write_image

TRANSFORM = create_eval_transform(Preprocessing(input_size=(3, 32, 32)))


def _batches(root: Path, *, replace_bad: bool, num_workers: int = 0) -> list:
    samples = list_images(root)[1]
    dataset = ImageFolderDataset(samples, TRANSFORM, replace_bad=replace_bad)
    return list(DataLoader(dataset, batch_size=4, collate_fn=collate_images, num_workers=num_workers))


def test_scan_reads_train_and_val(tmp_path: Path) -> None:
    write_folder(tmp_path, count=2, splits=("train", "val"))
    splits = scan_image_folder(tmp_path)
    assert splits.class_names == ["blue", "green", "red"]
    assert [(s.path.relative_to(tmp_path).as_posix(), s.label) for s in splits.val] == [
        (f"val/{name}/{i}.jpg", label) for label, name in enumerate(splits.class_names) for i in range(2)
    ]


def test_scan_holds_out_share_of_every_class(tmp_path: Path) -> None:
    splits = scan_image_folder(write_folder(tmp_path, count=10), val_fraction=0.3)
    assert [sum(s.label == label for s in splits.val) for label in range(3)] == [3, 3, 3]
    assert len({s.path for s in splits.train} | {s.path for s in splits.val}) == 30


def test_scan_splits_alike_for_same_seed_only(tmp_path: Path) -> None:
    write_folder(tmp_path, count=10)
    first, again, other = (scan_image_folder(tmp_path, seed=seed).val for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_scan_splits_train_folder_without_val(tmp_path: Path) -> None:
    splits = scan_image_folder(write_folder(tmp_path, count=4, splits=("train",)), val_fraction=0.5)
    assert (splits.class_names, len(splits.train), len(splits.val)) == (["blue", "green", "red"], 6, 6)


def test_scan_numbers_val_by_classes_of_train(tmp_path: Path) -> None:
    write_folder(tmp_path, count=2, splits=("train",))
    write_image(tmp_path / "val" / "red" / "0.png", (220, 40, 30))
    assert [s.label for s in scan_image_folder(tmp_path).val] == [2]


def test_scan_refuses_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone is missing"):
        scan_image_folder(tmp_path / "gone")


def test_scan_refuses_folder_without_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "loose.jpg", (1, 2, 3))
    with pytest.raises(UsageError, match="one sub-folder per class"):
        scan_image_folder(tmp_path)


def test_scan_refuses_single_class(tmp_path: Path) -> None:
    write_image(tmp_path / "only" / "0.jpg", (1, 2, 3))
    with pytest.raises(UsageError, match=r"at least two class folders .* found only only"):
        scan_image_folder(tmp_path)


def test_scan_names_class_without_images(tmp_path: Path) -> None:
    write_folder(tmp_path, count=2)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "notes.txt").write_text("none")
    with pytest.raises(UsageError, match=r"class hollow of .* has no image"):
        scan_image_folder(tmp_path)


def test_scan_names_class_only_in_val(tmp_path: Path) -> None:
    write_folder(tmp_path, count=2, splits=("train", "val"))
    write_image(tmp_path / "val" / "violet" / "0.jpg", (200, 0, 200))
    with pytest.raises(UsageError, match=r"class violet is in .*val but not in .*train"):
        scan_image_folder(tmp_path)


def test_scan_refuses_class_too_small_to_split(tmp_path: Path) -> None:
    write_folder(tmp_path, count=3)
    write_image(tmp_path / "single" / "0.jpg", (1, 2, 3))
    with pytest.raises(UsageError, match=r"two images in class single .*, got 1"):
        scan_image_folder(tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_scan_refuses_fraction_outside_unit_interval(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match="val_fraction between 0 and 1"):
        scan_image_folder(write_folder(tmp_path, count=2), val_fraction=fraction)


def test_list_images_finds_nested_and_upper_case_names(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "deep" / "0.JPEG", (1, 2, 3))
    write_image(tmp_path / "a" / ".hidden.png", (1, 2, 3))
    assert [s.path.name for s in list_images(tmp_path)[1]] == ["0.JPEG"]


@pytest.mark.parametrize("splits", [("",), ("train", "val")])
def test_hidden_class_folder_is_left_out_and_named(tmp_path: Path, caplog, splits: tuple[str, ...]) -> None:
    for split in splits:
        write_folder(tmp_path / split, count=2)
    write_image(tmp_path / splits[0] / ".ipynb_checkpoints" / "0.png", (1, 2, 3))
    assert ".ipynb_checkpoints" not in scan_image_folder(tmp_path).class_names
    assert re.search(r"1 x hidden folder, first .*\.ipynb_checkpoints", caplog.text)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_left_out_and_named_in_evaluation(tmp_path: Path, num_workers: int) -> None:
    write_folder(tmp_path, count=4)
    truncate(write_image(tmp_path / "blue" / "1.jpg", (1, 2, 3), size=(99, 99)))
    write_image(tmp_path / "red" / "2.jpg", (1, 2, 3), size=(20, 16))
    batches = _batches(tmp_path, replace_bad=False, num_workers=num_workers)
    assert sum(len(batch.images) for batch in batches) == 10
    assert [Path(bad.path).relative_to(tmp_path).as_posix() for batch in batches for bad in batch.bad] == [
        "blue/1.jpg",
        "red/2.jpg",
    ]


def test_bad_image_is_replaced_by_next_in_training(tmp_path: Path) -> None:
    write_folder(tmp_path, count=4)
    (tmp_path / "blue" / "3.jpg").write_bytes(b"")
    batches = _batches(tmp_path, replace_bad=True)
    assert [batch.labels.tolist() for batch in batches] == [[0, 0, 0, 1], [1, 1, 1, 1], [2, 2, 2, 2]]
    assert [bad.path for batch in batches for bad in batch.bad] == [str(tmp_path / "blue" / "3.jpg")]


def test_batch_is_empty_when_no_image_can_be_read(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i}.jpg").write_bytes(b"")
    (batch,) = _batches(tmp_path, replace_bad=True)
    assert len(batch.images) == 0
    assert {bad.path for bad in batch.bad} == {str(tmp_path / "a" / f"{i}.jpg") for i in range(3)}


def test_real_photographs_become_normalised_batches(tmp_path: Path) -> None:
    with tarfile.open(shared_archive("fixtures_tiny.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    batches = _batches(tmp_path / "fixtures_tiny" / "flowers", replace_bad=False)
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (30, 3, 32, 32)
    assert not [bad for batch in batches for bad in batch.bad]
    assert images.mean().abs() < 1
    assert 0.5 < images.std() < 2


def _write_splits(root: Path, *splits: str) -> Path:
    for number, split in enumerate(splits):
        for name in ("cat", "dog"):
            for i in range(3):
                write_image(root / split / name / f"{i}.png", (90, 60, 200), seed=100 * number + i)
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val"),
        ("TRAIN", "TEST"),
        ("training", "testing"),
        ("Training", "Validation"),
        ("train", "valid"),
    ],
)
def test_scan_finds_usual_split_names_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    splits = scan_image_folder(_write_splits(tmp_path, *names))
    assert (splits.class_names, len(splits.train), len(splits.val)) == (["cat", "dog"], 6, 6)
    assert {sample.path.relative_to(tmp_path).parts[0] for sample in splits.val} == {names[1]}


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("train2017", "val2017"), ("dev", "eval")])
def test_scan_refuses_folders_that_look_like_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="look like splits, not classes: rename them to train and val"):
        scan_image_folder(_write_splits(tmp_path, *names))


def test_scan_refuses_val_folder_of_unknown_name(tmp_path: Path) -> None:
    root = _write_splits(tmp_path, "train", "val_set")
    with pytest.raises(UsageError, match="found val_set: pass its name as val_split"):
        scan_image_folder(root)
    assert len(scan_image_folder(root, val_split="val_set").val) == 6


def test_scan_refuses_split_names_that_differ_in_case_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one split train in .*, found TRAIN and Train"):
        scan_image_folder(_write_splits(tmp_path, "Train", "TRAIN", "val"))


def test_scan_refuses_splits_below_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            write_image(tmp_path / name / split / "0.png", (1, 2, 3))
    with pytest.raises(UsageError, match="contains the splits train and test"):
        scan_image_folder(tmp_path)


def test_scan_refuses_images_and_masks_as_classes(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        for i in range(3):
            write_image(tmp_path / name / f"{i}.png", (1, 2, 3))
    with pytest.raises(UsageError, match="look like a dataset for detection or segmentation"):
        scan_image_folder(tmp_path)
