"""Conversion of Pascal VOC annotations."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightspine.data.convert import convert_voc
from lightspine.data.convert.voc import parse_xml
from lightspine.data.detection import read_coco
from lightspine.data.modules import CocoDataModule
from lightspine.errors import LightspineError, UsageError
from support.images import write_image

BOX = (11, 6, 30, 25)


def _object(name: str = "cat", box: tuple[Any, ...] = BOX, difficult: int = 0) -> str:
    corners = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def _annotation(*objects: str, name: str = "0.jpg", size: tuple[int, int] = (64, 48)) -> str:
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
        f"<depth>3</depth></size>{''.join(objects)}</annotation>"
    )


def _write(
    root: Path, files: dict[str, str], *, images: str = "JPEGImages", xml: str = "Annotations"
) -> Path:
    for number, (stem, content) in enumerate(files.items()):
        write_image(root / images / f"{stem}.jpg", (90, 60, 200), size=(64, 48), seed=number)
        path = root / xml / f"{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def _four(*objects: str) -> dict[str, str]:
    return {str(i): _annotation(*objects, name=f"{i}.jpg") for i in range(4)}


def _boxes(out: Path, split: str) -> list[list[float]]:
    content = json.loads((out / "annotations" / f"instances_{split}.json").read_text())
    return [entry["bbox"] for entry in content["annotations"]]


def test_pixels_counted_from_1_become_coordinates(tmp_path: Path) -> None:
    found = convert_voc(_write(tmp_path / "in", _four(_object(box=(1, 11, 64, 48)))), tmp_path / "out")
    assert _boxes(tmp_path / "out", "val") == [[0, 10, 64, 38]]
    assert (found.images, found.objects) == ({"train": 3, "val": 1}, {"train": 3, "val": 1})
    assert not found.issues


def test_coordinates_counted_from_0_are_kept(tmp_path: Path) -> None:
    convert_voc(_write(tmp_path / "in", _four(_object(box=(0, 10, 64, 48)))), tmp_path / "out", first_pixel=0)
    assert _boxes(tmp_path / "out", "val") == [[0, 10, 64, 38]]


def test_result_is_what_the_data_module_reads(tmp_path: Path) -> None:
    convert_voc(_write(tmp_path / "in", _four(_object("dog"), _object("cat"))), tmp_path / "out")
    data = CocoDataModule(tmp_path / "out", masks=False)
    assert data.class_names == ["cat", "dog"]
    assert data.train_annotations.labels.tolist() == [1, 0] * 3
    assert data.train_annotations.corners(0).tolist() == [[10, 5, 30, 25]] * 2


@pytest.mark.parametrize("edition", [".", "VOCdevkit/VOC2012"])
def test_split_lists_are_kept(edition: str, tmp_path: Path) -> None:
    root = _write(tmp_path / "in" / edition, _four(_object()))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, stems in (("train", "0\n3\n"), ("val", "1 -1\n")):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(stems)
    found = convert_voc(tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "train").rglob("*.jpg")) == ["0.jpg", "3.jpg"]
    assert (found.images, found.issues.counts["image in no split list"]) == ({"train": 2, "val": 1}, 1)


@pytest.mark.parametrize("splits", [("train", "valid"), ("Train", "Val")])
def test_split_folders_are_kept(splits: tuple[str, str], tmp_path: Path) -> None:
    for split in splits:
        _write(tmp_path / "in" / split, {"0": _annotation(_object())}, images=".", xml=".")
    found = convert_voc(tmp_path / "in", tmp_path / "out")
    assert found.images == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        pytest.param(_annotation(_object(box=(20, 6, 20, 25.0, "")[:4])), None, id="one pixel wide"),
        pytest.param(_annotation(_object(), _object(box=(30, 6, 10, 25))), "box without area", id="reversed"),
        pytest.param(
            _annotation(_object(), _object(box=(70, 6, 90, 25))), "box outside the image", id="outside"
        ),
        pytest.param(
            _annotation(_object(), _object(box=(60, 6, 90, 25))),
            "box that reaches beyond the image, clipped",
            id="beyond",
        ),
        pytest.param(
            _annotation(_object(), _object(box=("a", 6, 9, 25))), "object without four corners", id="text"
        ),
        pytest.param(_annotation(_object(), _object(" ")), "object without a class name", id="no name"),
        pytest.param(
            _annotation(_object(), _object(box=(0, 0, 9, 9))),
            "corner below 1, the first pixel; if corners count from 0, pass --first-pixel 0",
            id="from 0",
        ),
        pytest.param(
            _annotation(_object(), size=(640, 480)),
            "image of another size than its annotation says",
            id="size",
        ),
        pytest.param(
            _annotation(_object(), size=(48, 64)),
            "image annotated with height and width exchanged, as if before its EXIF orientation was applied",
            id="turned",
        ),
        pytest.param("<annotation>", "annotation file that is not XML", id="broken"),
        pytest.param("<labels/>", "XML file that is not a VOC annotation", id="other XML"),
        pytest.param(
            "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>",
            "annotation file with a document type (DTD)",
            id="entities",
        ),
    ],
)
def test_flaw_is_counted(content: str, kind: str | None, tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(_object()) | {"x": content.replace("0.jpg", "x.jpg")})
    found = convert_voc(root, tmp_path / "out")
    kinds = set(found.issues.counts) - {"image without a usable annotation file"}
    assert kinds == (set() if kind is None else {kind})
    assert sum(found.images.values()) == (5 if kind is None or kind in _KEEPS_IMAGE else 4)


_KEEPS_IMAGE = {
    "box without area",
    "box outside the image",
    "box that reaches beyond the image, clipped",
    "object without four corners",
    "object without a class name",
    "corner below 1, the first pixel; if corners count from 0, pass --first-pixel 0",
}


@pytest.mark.parametrize(
    ("difficult", "objects", "crowds"), [("crowd", 8, 4), ("keep", 8, 0), ("drop", 4, 0)]
)
def test_difficult_objects(difficult: Any, objects: int, crowds: int, tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(_object(), _object(difficult=1)))
    convert_voc(root, tmp_path / "out", difficult=difficult)
    found = [
        read_coco(tmp_path / f"out/annotations/instances_{split}.json", tmp_path / "out" / split, masks=False)
        for split in ("train", "val")
    ]
    assert sum(len(part.labels) for part in found) == objects
    assert sum(int(part.crowd.sum()) for part in found) == crowds


def test_image_without_annotation_is_counted(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(_object()))
    write_image(root / "JPEGImages" / "extra.jpg", (1, 2, 3))
    found = convert_voc(root, tmp_path / "out")
    assert "1 x image without a usable annotation file, first" in str(found.issues)


def test_image_is_that_of_its_exif_orientation(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(_object()))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(root / "JPEGImages" / "1.jpg", exif=exif)
    assert sum(convert_voc(root, tmp_path / "out").images.values()) == 4


def test_nested_entities_are_not_expanded(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "x" * 10}">' for i in range(12))
    file = tmp_path / "bomb.xml"
    file.write_text(f"<!DOCTYPE a [{entities}]><annotation>&e11;</annotation>")
    started = time.process_time()
    with pytest.raises(LightspineError, match="document type"):
        parse_xml(file)
    assert time.process_time() - started < 1


def test_external_entity_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    file = tmp_path / "a.xml"
    file.write_text(f"<!DOCTYPE a [<!ENTITY b SYSTEM '{tmp_path / 'secret'}'>]><annotation>&b;</annotation>")
    with pytest.raises(LightspineError, match="document type"):
        parse_xml(file)


def test_links_in_place_of_copies(tmp_path: Path) -> None:
    convert_voc(_write(tmp_path / "in", _four(_object())), tmp_path / "out", link=True)
    assert all(path.is_symlink() for path in (tmp_path / "out" / "train").iterdir())


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("in", "expected a new or empty folder"), ("in/new", "expected an output folder outside")],
)
def test_output_folder_is_checked(out: str, sentence: str, tmp_path: Path) -> None:
    root = _write(tmp_path / "in", _four(_object()))
    with pytest.raises(UsageError, match=sentence):
        convert_voc(root, tmp_path / out)
    assert len(list((root / "JPEGImages").iterdir())) == 4


def test_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "0.jpg", (1, 2, 3))
    with pytest.raises(UsageError, match=r"expected VOC annotations \(\.xml\)"):
        convert_voc(tmp_path / "in", tmp_path / "out")


def test_annotations_without_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found no object to convert"):
        convert_voc(_write(tmp_path / "in", _four()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_with_blanks_in_split_lists_are_found(tmp_path: Path) -> None:
    files = {name: _annotation(_object(), name=f"{name}.jpg") for name in ("img 1", "img 2", "img 3", "4")}
    root = _write(tmp_path / "in", files)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("img 1\nimg 2  1\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("img 3 -1\n4 -1\n")
    found = convert_voc(root, tmp_path / "out")
    assert (found.images, list(found.issues.counts)) == ({"train": 2, "val": 2}, [])


def _two_spellings(root: Path) -> Path:
    names = ("cat", "Cat", "cat", "dog")
    return _write(root, {str(i): _annotation(_object(name), name=f"{i}.jpg") for i, name in enumerate(names)})


def test_class_names_that_differ_in_case_are_reported(tmp_path: Path) -> None:
    found = convert_voc(_two_spellings(tmp_path / "in"), tmp_path / "out")
    assert found.class_names == ["Cat", "cat", "dog"]
    assert list(found.issues.examples.values()) == ["Cat and cat"]


def test_file_of_class_names_joins_spellings_and_leaves_out_other_classes(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("bird\nCAT\n")
    found = convert_voc(_two_spellings(tmp_path / "in"), tmp_path / "out", class_names=names)
    assert found.class_names == ["bird", "CAT"]
    assert sum(found.objects.values()) == 3
    assert found.issues.sentences() == [
        f"1 x object of a class that is not in {names}, first dog in {tmp_path}/in/JPEGImages/3.jpg"
    ]
