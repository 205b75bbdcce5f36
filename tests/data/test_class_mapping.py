"""Class mapping files: the four formats, and applying them to images."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightspine.data import ClassMapping, imagenet_class_mapping, load_class_mapping
from lightspine.errors import LightspineError, UsageError
from support.images import write_image


def _mapping(tmp_path: Path, content: Any) -> ClassMapping:
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(content))
    return load_class_mapping(path)


def _images(root: Path, *names: str) -> Path:
    for name in names:
        write_image(root / name, (9, 9, 9))
    return root


def _found(mapping: ClassMapping, root: Path) -> dict[str, tuple[int, ...]]:
    return {image.path.relative_to(root).as_posix(): image.labels for image in mapping.find(root)}


def test_folder_names_get_their_class(tmp_path: Path) -> None:
    mapping = _mapping(tmp_path, {"cat": 7, "dog": 3, "unused": 5})
    root = _images(tmp_path / "images", "dog/a.jpg", "cat/b.png")
    assert _found(mapping, root) == {"cat/b.png": (7,), "dog/a.jpg": (3,)}


def test_list_numbers_the_sorted_folders(tmp_path: Path) -> None:
    mapping = _mapping(tmp_path, [0, 1, 10, 2])
    root = _images(tmp_path / "images", "0/a.jpg", "1/a.jpg", "2/a.jpg", "10/a.jpg")
    assert _found(mapping, root) == {"0/a.jpg": (0,), "1/a.jpg": (1,), "10/a.jpg": (10,), "2/a.jpg": (2,)}


def test_real_lists_go_by_number_and_skip_images_without_a_class(tmp_path: Path) -> None:
    mapping = _mapping(tmp_path, [[], [970, 795], [230]])
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)]
    root = _images(tmp_path / "val", *names)
    assert _found(mapping, root) == {names[1]: (970, 795), names[2]: (230,)}


def test_named_images_may_lie_in_class_folders(tmp_path: Path) -> None:
    mapping = _mapping(tmp_path, {"a.jpg": [4, 5], "b.jpg": [1]})
    root = _images(tmp_path / "val", "x/a.jpg", "y/b.jpg")
    assert _found(mapping, root) == {"x/a.jpg": (4, 5), "y/b.jpg": (1,)}


def test_candidates_are_the_classes_of_the_folders(tmp_path: Path) -> None:
    assert _mapping(tmp_path, {"b": 6, "a": 7, "c": 6}).candidates == (6, 7)
    assert _mapping(tmp_path, [3, 1]).candidates == (1, 3)
    assert _mapping(tmp_path, [[3], [1]]).candidates is None


def test_unknown_folder_is_named(tmp_path: Path) -> None:
    root = _images(tmp_path / "images", "cat/a.jpg", "owl/a.jpg")
    with pytest.raises(UsageError, match=r"folder owl of .* not in the class mapping"):
        _mapping(tmp_path, {"cat": 1}).find(root)


def test_wrong_number_of_folders_is_refused(tmp_path: Path) -> None:
    root = _images(tmp_path / "images", "cat/a.jpg")
    with pytest.raises(UsageError, match=r"expected 2 class folders .* got 1"):
        _mapping(tmp_path, [1, 2]).find(root)


@pytest.mark.parametrize("name", ["ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000000.JPEG", "cat.jpg"])
def test_image_without_an_entry_is_named(tmp_path: Path, name: str) -> None:
    root = _images(tmp_path / "val", name)
    with pytest.raises(UsageError, match=f"end in a number from 1 to 2.*{name}"):
        _mapping(tmp_path, [[1], [2]]).find(root)


def test_unknown_image_is_named(tmp_path: Path) -> None:
    root = _images(tmp_path / "val", "c.jpg")
    with pytest.raises(UsageError, match=r"c\.jpg is not in the class mapping"):
        _mapping(tmp_path, {"a.jpg": [1]}).find(root)


@pytest.mark.parametrize("content", [{}, [], 3, {"a": "x"}, [1, [2]], [-1], [True], {"a": [1.5]}])
def test_other_content_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UsageError, match=r"expected class indices, or lists of them"):
        _mapping(tmp_path, content)


def test_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "mapping.json").write_text("{")
    with pytest.raises(LightspineError, match=r"cannot read class mapping .*mapping\.json"):
        load_class_mapping(tmp_path / "mapping.json")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.json is not a file"):
        load_class_mapping(tmp_path / "gone.json")


def test_imagenet_folders_are_mapped_by_id_or_number(tmp_path: Path) -> None:
    by_id = _images(tmp_path / "a", "n01440764/x.jpg", "n15075141/x.jpg", "n02012849/x.jpg")
    by_number = _images(tmp_path / "v2", "0/x.jpg", "999/x.jpg")
    assert imagenet_class_mapping(by_id).candidates == (0, 134, 999)
    assert imagenet_class_mapping(by_number).folders == {"0": 0, "999": 999}


def test_folder_of_no_imagenet_class_is_named(tmp_path: Path) -> None:
    root = _images(tmp_path / "a", "n01440764/x.jpg", "n99999999/x.jpg")
    with pytest.raises(UsageError, match="got n99999999"):
        imagenet_class_mapping(root)
