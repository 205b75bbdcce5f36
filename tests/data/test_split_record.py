"""Which images a run trained on and held out, recognized by the hashes that its files store."""

import shutil
from pathlib import Path

import pytest

from lightspine.data.split_record import SplitRecord, record_split
from lightspine.errors import LightspineError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "own"


def _record(folder: Path) -> SplitRecord:
    train, val = ([str(folder / name / file) for name in ("cat", "dog")] for file in ("0.png", "1.png"))
    return record_split(train, val, val_fraction=0.5, seed=3)


def _images(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.png"))]


@pytest.mark.parametrize(("pattern", "part"), [("*/*.png", "all"), ("*/0.png", "train"), ("*/1.png", "val")])
def test_parts_of_a_folder_are_recognized(folder: Path, pattern: str, part: str) -> None:
    assert _record(folder).find_part([str(path) for path in folder.glob(pattern)]) == part


def test_a_copy_elsewhere_is_the_same_images(folder: Path, tmp_path: Path) -> None:
    record = _record(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert record.find_part(_images(tmp_path / "elsewhere")) == "all"


def test_other_images_of_the_same_names_are_others(folder: Path, tmp_path: Path) -> None:
    record = _record(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*.png"):
        path.write_bytes(path.read_bytes() * 2)
    assert record.find_part(_images(tmp_path / "elsewhere")) is None


def test_an_added_image_is_noticed(folder: Path) -> None:
    record = _record(folder)
    (folder / "cat" / "2.png").write_bytes(b"new")
    assert record.find_part(_images(folder)) == "changed"


def test_data_with_splits_has_no_fraction(folder: Path) -> None:
    for name in ("train", "val"):
        shutil.copytree(folder, folder.parent / "splits" / name)
    train, val = (_images(folder.parent / "splits" / name) for name in ("train", "val"))
    record = record_split(train, val, val_fraction=0.2, seed=0)
    assert record.val_fraction is record.seed is record.all_sha256 is None


def test_a_record_survives_json_and_damage_is_named(folder: Path) -> None:
    record = _record(folder)
    assert SplitRecord.from_dict(record.to_dict()) == record
    with pytest.raises(LightspineError, match="expected a record of the split with"):
        SplitRecord.from_dict({"train_sha256": ""})


@pytest.mark.parametrize(
    ("name", "value"), [("all_sha256", []), ("train_images", "many"), ("seed", 1.5), ("val_fraction", "x")]
)
def test_field_of_another_type_is_refused(name: str, value: object) -> None:
    values = record_split(["/a/0.png"], ["/a/1.png"]).to_dict() | {name: value}
    with pytest.raises(LightspineError, match=f"the record of the split has the {name}"):
        SplitRecord.from_dict(values)
