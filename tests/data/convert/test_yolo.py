"""Conversion of YOLO annotations."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightspine.data.convert import convert_yolo
from lightspine.data.detection import read_coco, select_images
from lightspine.data.modules import CocoDataModule
from lightspine.errors import LightspineError, UsageError
from support.coco import real_annotations
from support.images import write_image

YAML = "names: [cat, dog]\n"
BOX = "1 0.5 0.5 0.25 0.5"


def _write(root: Path, labels: dict[str, str], *, yaml: str | None = YAML, split: str = "") -> Path:
    for number, (stem, text) in enumerate(labels.items()):
        write_image(root / "images" / split / f"{stem}.jpg", (90, 60, 200), size=(64, 48), seed=number)
        path = root / "labels" / split / f"{stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if yaml is not None:
        (root / "data.yaml").write_text(yaml)
    return root


def _four(text: str) -> dict[str, str]:
    return {str(i): text for i in range(4)}


def _content(out: Path, split: str) -> dict[str, Any]:
    return json.loads((out / "annotations" / f"instances_{split}.json").read_text())


def test_box_by_its_center_becomes_pixels(tmp_path: Path) -> None:
    found = convert_yolo(_write(tmp_path / "in", _four(BOX)), tmp_path / "out")
    [entry] = _content(tmp_path / "out", "val")["annotations"]
    assert entry["bbox"] == [24, 12, 16, 24]
    assert (entry["category_id"], found.class_names, bool(found.issues)) == (2, ["cat", "dog"], False)


def test_polygon_becomes_mask_and_box(tmp_path: Path) -> None:
    convert_yolo(_write(tmp_path / "in", _four("0 0.25 0.25 0.75 0.25 0.75 0.75\n")), tmp_path / "out")
    data = CocoDataModule(tmp_path / "out")
    assert data.train_annotations.boxes[0].tolist() == [16, 12, 32, 24]
    assert data.train_annotations.segmentation(0) == [[16, 12, 48, 12, 48, 36]]
    assert data.train_annotations.areas[0] == 32 * 24 / 2


def test_boxes_of_real_images_come_back(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    original = real_annotations("fixtures_tiny", "coco", tmp_path_factory, masks=False)
    root = tmp_path / "in"
    for position in range(len(original)):
        height, width = original.sizes[position]
        path = original.path(position)
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "labels").mkdir(exist_ok=True)
        (root / "images" / path.name).symlink_to(path)
        rows = []
        for number in original.objects(position):
            left, top, w, h = original.boxes[number] / (width, height, width, height)
            rows.append(f"{original.labels[number]} {left + w / 2!r} {top + h / 2!r} {w!r} {h!r}")
        (root / "labels" / f"{path.stem}.txt").write_text(
            "\n".join(rows).replace("np.float64", "").replace("(", "").replace(")", "")
        )
    (root / "data.yaml").write_text(json.dumps({"names": original.class_names}))
    found = convert_yolo(root, tmp_path / "out")
    assert sum(found.objects.values()) == len(original.labels)
    assert not found.issues
    for split in ("train", "val"):
        file = tmp_path / "out" / "annotations" / f"instances_{split}.json"
        part = read_coco(file, tmp_path / "out" / split, masks=False)
        positions = [list(original.files).index(name) for name in part.files]
        expected = select_images(original, np.array(positions))
        assert part.labels.tolist() == expected.labels.tolist()
        assert np.allclose(part.boxes, expected.boxes, atol=1e-6)


@pytest.mark.parametrize(
    "yaml",
    [
        YAML + "train: images/train\nval: images/val\n",
        YAML + "path: ../elsewhere/set\ntrain: images/train\nval: [images/val]\n",
        YAML + "path: /home/someone/set\ntrain: ../images/train\nval: ../images/val\ntest: images/test\n",
        YAML + "train: train_list.txt\nval: val_list.txt\n",
        YAML,
        "names:\n  0: cat\n  1: dog\n",
    ],
    ids=["folders", "path", "roboflow", "lists", "no entries", "numbered names"],
)
def test_splits_are_kept(yaml: str, tmp_path: Path) -> None:
    root = tmp_path / "in"
    _write(root, {"a": BOX, "b": BOX}, split="train", yaml=None)
    _write(root, {"c": BOX}, split="val", yaml=yaml)
    if "list" in yaml:
        (root / "train_list.txt").write_text("./images/train/a.jpg\nimages/train/b.jpg\n")
        (root / "val_list.txt").write_text("/somewhere/images/val/c.jpg\n")
    found = convert_yolo(root, tmp_path / "out")
    assert found.images == {"train": 2, "val": 1}
    assert "label file without an image" not in found.issues.counts


@pytest.mark.parametrize("layout", ["{split}/images", "{split}"])
def test_split_folders_above_the_images_are_kept(layout: str, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        folder = tmp_path / "in" / layout.format(split=split)
        write_image(folder / "0.jpg", (90, 60, 200), size=(64, 48))
        labels = folder.parent / "labels" if folder.name == "images" else folder
        labels.mkdir(exist_ok=True)
        (labels / "0.txt").write_text(BOX)
    (tmp_path / "in" / "classes.txt").write_text("cat\ndog\n")
    found = convert_yolo(tmp_path / "in", tmp_path / "out")
    assert (found.images, found.objects) == ({"train": 1, "val": 1}, {"train": 1, "val": 1})


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("7 0.5 0.5 0.1 0.1", "class index that is not among the 2 classes"),
        ("-1 0.5 0.5 0.1 0.1", "class index that is not among the 2 classes"),
        ("cat 0.5 0.5 0.1 0.1", "line that is not a class index and numbers"),
        ("0 0.5 nan 0.1 0.1", "line that is not a class index and numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "line that is neither a box of 4 numbers nor a polygon of 6 or more"),
        (
            "0 0.1 0.2 0.3 0.4 0.5 0.6 0.7",
            "line that is neither a box of 4 numbers nor a polygon of 6 or more",
        ),
        ("0 32 24 16 24", "coordinates that are not fractions of the image, from 0 to 1"),
        ("0 0.5 0.5 0 0.1", "box without area"),
        ("0 0.9 0.5 0.8 0.1", "box that reaches beyond the image, clipped"),
        (BOX, "line that is repeated"),
    ],
)
def test_flawed_line_is_counted(line: str, kind: str, tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(BOX) | {"x": f"{BOX}\n\n{line}\n"})
    found = convert_yolo(root, tmp_path / "out")
    assert found.issues.sentences() == [f"1 x {kind}, first {root / 'labels' / 'x.txt'}, line 3"]


def test_images_and_labels_without_partner_are_counted(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(BOX) | {"empty": ""})
    (root / "labels" / "0.txt").rename(root / "labels" / "gone.txt")
    found = convert_yolo(root, tmp_path / "out")
    assert dict(found.issues.counts) == {
        "image without a label file, taken as one without objects": 1,
        "label file without an image": 1,
    }
    assert sum(found.images.values()) == 5


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        (None, "expected class names: `names` in data.yaml"),
        ("names: [cat, cat]\n", "expected different class names"),
        ("names: {0: cat, 2: dog}\n", "expected class names numbered from 0 to 1"),
        (YAML + "train: ../../other\n", "expected the train split ../../other of the YAML file"),
    ],
)
def test_yaml_file_is_checked(yaml: str | None, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=sentence):
        convert_yolo(_write(tmp_path / "deep" / "in", _four(BOX), yaml=yaml), tmp_path / "out")


def test_notes_of_roboflow_are_no_labels(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(BOX))
    for name in ("README.roboflow.txt", "README.dataset.txt"):
        (root / name).write_text("exported\n")
    assert not convert_yolo(root, tmp_path / "out").issues


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        (f"{BOMB}{YAML}train: *i\n", "received more by its aliases"),
        (f"{YAML}x: {'[' * 60}{']' * 60}\n", "nested up to 50 times"),
    ],
    ids=["aliases", "depth"],
)
def test_yaml_file_that_stands_for_gigabytes_is_refused(yaml: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match=sentence):
        convert_yolo(_write(tmp_path / "in", _four(BOX), yaml=yaml), tmp_path / "out")


def test_split_of_an_impossible_name_is_missing(tmp_path: Path) -> None:
    source = _write(tmp_path / "in", _four(BOX), yaml=f'{YAML}train: "\\0"\n')
    with pytest.raises(UsageError, match="expected the train split"):
        convert_yolo(source, tmp_path / "out")


def test_named_pipe_among_the_labels_is_counted(tmp_path: Path) -> None:
    source = _write(tmp_path / "in", _four(BOX))
    (source / "labels" / "0.txt").unlink()
    os.mkfifo(source / "labels" / "0.txt")
    found = convert_yolo(source, tmp_path / "out")
    assert found.issues.counts["annotation file that is no ordinary file"] == 1


def test_named_pipe_in_place_of_the_yaml_file_is_not_read(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(BOX), yaml=None)
    os.mkfifo(root / "data.yaml")
    (root / "classes.txt").write_text("cat\ndog\n")
    assert convert_yolo(root, tmp_path / "out").class_names == ["cat", "dog"]
