"""Conversion of LabelMe annotations."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightspine.data.convert import convert_labelme
from lightspine.data.modules import CocoDataModule
from lightspine.errors import UsageError
from support.coco import real_annotations
from support.images import write_image

TRIANGLE = [[10, 6], [30, 6], [30, 26]]


def _shape(label: str = "cat", points: Any = TRIANGLE, kind: str = "polygon") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}


def _write(root: Path, *shapes: Any, count: int = 4, **changes: Any) -> Path:
    for number in range(count):
        write_image(root / f"{number}.jpg", (90, 60, 200), size=(64, 48), seed=number)
        content = {
            "version": "5.0.1",
            "shapes": list(shapes),
            "imagePath": f"..\\photos\\{number}.jpg",
            "imageData": None,
            "imageHeight": 48,
            "imageWidth": 64,
        }
        (root / f"{number}.json").write_text(json.dumps(content | changes))
    return root


def test_polygon_becomes_mask_and_box(tmp_path: Path) -> None:
    found = convert_labelme(_write(tmp_path / "in", _shape()), tmp_path / "out")
    assert (found.images, found.class_names, bool(found.issues)) == ({"train": 3, "val": 1}, ["cat"], False)
    data = CocoDataModule(tmp_path / "out")
    assert data.train_annotations.boxes[0].tolist() == [10, 6, 20, 20]
    assert data.train_annotations.segmentation(0) == [[10, 6, 30, 6, 30, 26]]
    assert data.train_annotations.areas[0] == 200


def test_rectangle_of_any_two_corners_becomes_a_box(tmp_path: Path) -> None:
    corners = _shape(points=[[30, 26], [10, 6]], kind="rectangle")
    convert_labelme(_write(tmp_path / "in", corners), tmp_path / "out")
    data = CocoDataModule(tmp_path / "out", masks=False)
    assert data.train_annotations.boxes[0].tolist() == [10, 6, 20, 20]


def test_polygons_of_real_images_come_back(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    original = real_annotations("fixtures_tiny", "coco", tmp_path_factory)
    root = tmp_path / "in" / "train"
    root.mkdir(parents=True)
    expected = []
    for position in range(len(original)):
        height, width = original.sizes[position].tolist()
        path = original.path(position)
        (root / path.name).write_bytes(path.read_bytes())
        parts = [original.segmentation(number) for number in original.objects(position)]
        polygons = [part[0] for part in parts if isinstance(part, list)]
        expected += polygons
        shapes = [
            _shape(points=[list(pair) for pair in zip(p[0::2], p[1::2], strict=True)]) for p in polygons
        ]
        described = {"shapes": shapes, "imagePath": path.name, "imageHeight": height, "imageWidth": width}
        (root / f"{path.stem}.json").write_text(json.dumps(described))
    convert_labelme(tmp_path / "in", tmp_path / "out", val_fraction=0.2)
    data = CocoDataModule(tmp_path / "out")
    found = [
        notes.segmentation(number)[0]
        for notes in (data.train_annotations, data.val_annotations)
        for number in range(len(notes.labels))
    ]
    assert sorted(found) == [pytest.approx(polygon) for polygon in sorted(expected)]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param(_shape(kind="circle"), "shape of the type circle", id="circle"),
        pytest.param(_shape(points=TRIANGLE[:2]), "polygon without enough points", id="two corners"),
        pytest.param(_shape(points=[[0, "x"]] * 3), "polygon without enough points", id="text"),
        pytest.param(_shape(label=" "), "shape without a label", id="no label"),
        pytest.param("shape", "shape that is not a JSON object", id="text in place of a shape"),
        pytest.param(_shape(points=[[99, 9], [99, 20], [120, 9]]), "box outside the image", id="outside"),
    ],
)
def test_unusable_shape_is_counted(shape: Any, kind: str, tmp_path: Path) -> None:
    found = convert_labelme(_write(tmp_path / "in", _shape(), shape), tmp_path / "out")
    assert (dict(found.issues.counts), sum(found.objects.values())) == ({kind: 4}, 4)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        pytest.param("{", "annotation file that is not JSON", id="not JSON"),
        pytest.param("{}", "JSON file that is not a LabelMe annotation", id="other JSON"),
        pytest.param('{"shapes": []}', "annotation file without an image", id="no image"),
    ],
)
def test_unusable_file_is_counted(content: str, kind: str, tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _shape())
    (root / "other.json").write_text(content)
    assert dict(convert_labelme(root, tmp_path / "out").issues.counts) == {kind: 1}


def test_image_of_another_size_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none: 4 x image of another size than its annotation says"):
        convert_labelme(_write(tmp_path / "in", _shape(), imageHeight=64), tmp_path / "out")


def test_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "1.jpg", (90, 60, 200))
    with pytest.raises(
        UsageError, match=r"expected LabelMe annotations \(.json with shapes\) in .*, found none$"
    ):
        convert_labelme(tmp_path / "in", tmp_path / "out")


def test_text_that_is_no_unicode_is_left_out(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _shape(), _shape("\ud800"), count=5)
    content = json.loads((root / "0.json").read_text())
    (root / "0.json").write_text(json.dumps(content | {"imagePath": "\ud800.jpg"}))
    found = convert_labelme(root, tmp_path / "out")
    assert found.class_names == ["cat"]
    assert found.issues.counts["annotation file whose image path is not valid Unicode"] == 1
