"""Segmentation folders: pairs of images and label maps, splits, class names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightspine.data.published_classes import ade20k_class_names
from lightspine.data.segmentation import LabelReader, read_ade20k_classes, scan_segmentation_folder
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import open_image
from support.coco import unpack
from support.images import write_image


def _write_pair(
    root: Path, name: str, labels: np.ndarray, *, split: str = "", folder: str = "annotations"
) -> None:
    write_image(root / "images" / split / f"{name}.jpg", (90, 60, 200), size=labels.shape[::-1])
    path = root / folder / split / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)


def _write_data(
    root: Path, *, splits: tuple[str, ...] = ("train", "val"), count: int = 4, **options: Any
) -> Path:
    for split in splits:
        for number in range(count):
            _write_pair(root, str(number), np.arange(40 * 48).reshape(40, 48) % 3, split=split, **options)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    return root


@pytest.mark.parametrize(
    ("splits", "folder"),
    [(("train", "val"), "annotations"), (("training", "validation"), "labels"), (("train", "test"), "masks")],
)
def test_scan_finds_the_splits_under_their_usual_names(
    splits: tuple[str, ...], folder: str, tmp_path: Path
) -> None:
    found = scan_segmentation_folder(_write_data(tmp_path, splits=splits, folder=folder))
    assert (len(found.train), len(found.val), found.class_names) == (4, 4, ["sky", "road", "tree"])


def test_scan_without_splits_holds_a_share_out_by_seed(tmp_path: Path) -> None:
    root = _write_data(tmp_path, splits=("",), count=10)
    found, again = (scan_segmentation_folder(root, seed=1, val_fraction=0.3) for _ in range(2))
    assert (len(found.train), len(found.val)) == (7, 3)
    assert found.val == again.val != scan_segmentation_folder(root, seed=2, val_fraction=0.3).val
    assert not set(found.train) & set(found.val)


def test_scan_names_images_without_labels(tmp_path: Path) -> None:
    root = _write_data(tmp_path)
    (root / "annotations/train/2.png").unlink()
    found = scan_segmentation_folder(root)
    assert (len(found.train), [path.name for path in found.unpaired]) == (3, ["2.jpg"])


@pytest.mark.parametrize(
    ("archive", "folder", "train", "val", "classes"),
    [("coco_free_semantic", ".", 26, 27, 133), ("fixtures_tiny", "semantic", 3, 1, 133)],
)
def test_scan_of_real_images(
    archive: str, folder: str, train: int, val: int, classes: int, tmp_path_factory: Any
) -> None:
    found = scan_segmentation_folder(unpack(archive, tmp_path_factory) / folder)
    assert (len(found.train), len(found.val), len(found.class_names)) == (train, val, classes)
    values = set(np.unique(found.reader.read(found.train[0].labels)).tolist())
    assert values <= {*range(classes), 255}
    assert len(values) > 1


def _write_ade20k(root: Path) -> Path:
    for split in ("training", "validation"):
        _write_pair(root, "ADE_00000001", np.arange(40 * 48).reshape(40, 48) % 4, split=split)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t.1\t9\t9\t1\twall", "2\t.1\t9\t9\t1\tdoor, gate"]
    (root / "objectInfo150.txt").write_text("\n".join([*rows, "3\t.1\t9\t9\t0\tdoor, screen"]) + "\n")
    return root


def test_scan_of_ade20k_takes_0_for_no_class(tmp_path: Path) -> None:
    found = scan_segmentation_folder(_write_ade20k(tmp_path))
    labels = found.reader.read(found.train[0].labels)
    assert labels[0, :5].tolist() == [255, 0, 1, 2, 255]
    assert found.class_names == ["wall", "door, gate", "door, screen"]


@pytest.mark.parametrize(
    "television", ["television receiver, television, tv", "television, television receiver"]
)
def test_every_release_of_ade20ks_table_gives_the_published_names(television: str, tmp_path: Path) -> None:
    names = [
        television if name == "television receiver" else f"{name} , other" for name in ade20k_class_names()
    ]
    rows = [f"{number}\t0.1\t9\t9\t{name}" for number, name in enumerate(names, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    found = read_ade20k_classes(tmp_path / "objectInfo150.txt")
    assert found[89] == "television receiver"
    assert found == ade20k_class_names()


@pytest.mark.parametrize("text", ["", "Idx\tName\n", "Idx\tName\n2\twall\n", "\xff"])
def test_read_ade20k_classes_of_another_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "objectInfo150.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LightspineError, match="objectInfo150"):
        read_ade20k_classes(path)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_scan_of_masks_of_0_and_255_is_refused(num_classes: int, tmp_path: Path) -> None:
    _write_pair(tmp_path, "a", 255 * np.eye(40, 40))
    _write_pair(tmp_path, "b", 255 * np.eye(40, 40))
    with pytest.raises(UsageError, match=r"got class 0 and ignored pixels .* pass remap=\{0: 0, 255: 1\}"):
        scan_segmentation_folder(tmp_path, num_classes=num_classes)


def test_scan_of_masks_of_0_and_255_with_remap(tmp_path: Path) -> None:
    _write_pair(tmp_path, "a", 255 * np.eye(40, 40))
    _write_pair(tmp_path, "b", 255 * np.eye(40, 40))
    found = scan_segmentation_folder(tmp_path, num_classes=2, remap={0: 0, 255: 1})
    assert np.unique(found.reader.read(found.train[0].labels)).tolist() == [0, 1]


def test_scan_of_many_empty_masks_before_those_of_255_is_refused(tmp_path: Path) -> None:
    for number in range(100):
        _write_pair(tmp_path, f"{number:03}", np.zeros((40, 40)) if number < 90 else 255 * np.eye(40, 40))
    with pytest.raises(UsageError, match="got class 0 and ignored pixels"):
        scan_segmentation_folder(tmp_path, num_classes=2)


def test_scan_finds_the_one_label_map_with_a_second_class(tmp_path: Path) -> None:
    for number in range(100):
        labels = np.eye(40, 40) if number == 51 else np.zeros((40, 40))
        _write_pair(tmp_path, f"{number:03}", labels, split="train")
    _write_pair(tmp_path, "v", np.eye(40, 40), split="val")
    assert len(scan_segmentation_folder(tmp_path, num_classes=2).train) == 100


def test_scan_of_label_maps_of_other_values_is_refused(tmp_path: Path) -> None:
    for name in "abc":
        _write_pair(tmp_path, name, 127 * (np.arange(40 * 48).reshape(40, 48) % 3))
    with pytest.raises(UsageError, match=r"none of 2 label maps can be read: .* hold the value 127"):
        scan_segmentation_folder(tmp_path, num_classes=3)


@pytest.mark.parametrize("splits", [("Train", "Val"), ("TRAINING", "Testing")])
def test_scan_finds_splits_in_any_case(splits: tuple[str, ...], tmp_path: Path) -> None:
    found = scan_segmentation_folder(_write_data(tmp_path, splits=splits))
    assert (len(found.train), len(found.val)) == (4, 4)


def test_scan_refuses_split_folders_of_other_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="look like splits: rename them to train and val"):
        scan_segmentation_folder(_write_data(tmp_path, splits=("train_set", "val_set")))


def test_scan_refuses_two_images_of_one_label_map(tmp_path: Path) -> None:
    root = _write_data(tmp_path)
    write_image(root / "images" / "train" / "1.png", (1, 2, 3))
    with pytest.raises(UsageError, match=r"expected one file 1 in .*, found 1\.jpg and 1\.png"):
        scan_segmentation_folder(root)


def test_scan_keeps_links_to_one_label_map(tmp_path: Path) -> None:
    root = _write_data(tmp_path)
    for number in (1, 2):
        path = root / "annotations" / "train" / f"{number}.png"
        path.unlink()
        path.symlink_to("0.png")
    assert len(scan_segmentation_folder(root).train) == 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_label_map_is_turned_like_its_image(orientation: int, suffix: str, tmp_path: Path) -> None:
    stored = (np.arange(40 * 48).reshape(40, 48) // 7 % 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"labels.{suffix}", exif=exif)
    Image.fromarray(stored * 100).save(tmp_path / f"image.{suffix}", exif=exif)
    labels = LabelReader(3).read(tmp_path / f"labels.{suffix}")
    image = np.asarray(open_image(tmp_path / f"image.{suffix}"))[..., 0]
    assert np.array_equal(labels * 100, image)


@pytest.mark.parametrize(
    ("harm", "options", "sentence"),
    [
        pytest.param("", {"num_classes": 4}, None, id="number of classes wins without names"),
        pytest.param(
            "", {"class_names": "classes.txt", "num_classes": 5}, "expected 5 class names", id="count"
        ),
        pytest.param("annotations", {}, "expected a folder annotations or labels or masks", id="no labels"),
        pytest.param("images/val", {}, "expected a folder val or validation", id="no val"),
        pytest.param("annotations/val/*", {}, "none of the 4 images", id="no pair"),
        pytest.param("", {"num_classes": 256}, "1 to 255 classes", id="too many"),
        pytest.param("", {"remap": {0: 9}}, "mapped to classes from 0 to 2", id="bad map"),
    ],
)
def test_scan_of_a_folder_that_lacks_something(
    harm: str, options: dict[str, Any], sentence: str | None, tmp_path: Path
) -> None:
    root = _write_data(tmp_path)
    for path in root.glob(harm) if harm else []:
        path.rename(path.with_name(f"gone_{path.name}"))
    options = {key: root / value if key == "class_names" else value for key, value in options.items()}
    if sentence is None:
        assert scan_segmentation_folder(root, **options).class_names == ["0", "1", "2", "3"]
        return
    with pytest.raises(UsageError, match=sentence):
        scan_segmentation_folder(root, **options)


@pytest.mark.parametrize("fraction", [0, 1])
def test_scan_with_a_fraction_out_of_range_is_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="val_fraction between 0 and 1"):
        scan_segmentation_folder(_write_data(tmp_path, splits=("",)), val_fraction=fraction)


def test_scan_of_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none is missing"):
        scan_segmentation_folder(tmp_path / "none")


def test_classes_are_found_in_the_label_maps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _write_data(tmp_path)
    (root / "classes.txt").unlink()
    with caplog.at_level("INFO", logger="lightspine"):
        assert scan_segmentation_folder(root).class_names == ["0", "1", "2"]
    assert "found 3 classes in the label maps" in caplog.text


def test_names_of_a_checkpoint_are_used_if_the_folder_has_none(tmp_path: Path) -> None:
    root = _write_data(tmp_path)
    (root / "classes.txt").unlink()
    names = ["sky", "road", "tree"]
    assert scan_segmentation_folder(root, default_names=names).class_names == names


def test_values_that_are_no_class_indices_are_refused_with_the_way_out(tmp_path: Path) -> None:
    root = _write_data(tmp_path)
    (root / "classes.txt").unlink()
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2 * 200).save(path)
    with pytest.raises(UsageError, match=r"got the values 0, 200: pass remap=\{0: 0, 200: 1\}"):
        scan_segmentation_folder(root)


def test_share_of_the_training_images_is_held_out_without_a_val_folder(tmp_path: Path) -> None:
    root = _write_data(tmp_path)
    for kind in ("images", "annotations"):
        (root / kind / "val").rename(tmp_path / f"moved_{kind}")
    found = scan_segmentation_folder(root, val_fraction=0.25)
    assert (len(found.train), len(found.val)) == (3, 1)
