"""`lightspine convert-data` and `lightspine show`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightspine_cli.main import main
from support.images import write_image


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    for number in range(4):
        write_image(tmp_path / "yolo" / "images" / f"{number}.jpg", (90, 60, 200), size=(64, 48))
        label = tmp_path / "yolo" / "labels" / f"{number}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text("0 0.5 0.5 0.5 0.5\n9 0.5 0.5 0.1 0.1\n")
    (tmp_path / "yolo" / "classes.txt").write_text("cat\n")
    return tmp_path / "yolo"


def test_convert_data_prints_counts(yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-data", "yolo", str(yolo), str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "left out or changed: 4 x class index that is not among the 1 classes, first" in output
    assert [line.split() for line in output.splitlines()[2:4]] == [["train", "3", "3"], ["val", "1", "1"]]


def test_convert_data_prints_json(yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-data", "yolo", str(yolo), str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["issues"][0]["count"]) == ({"train": 3, "val": 1}, 4)


def test_convert_data_of_masks_prints_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        write_image(tmp_path / "in" / "images" / f"{number}.jpg", (90, 60, 200), size=(64, 48))
        (tmp_path / "in" / "masks").mkdir(exist_ok=True)
        mask = np.where(np.arange(64) < 16, 255, 0).astype(np.uint8)
        Image.fromarray(np.tile(mask, (48, 1))).save(tmp_path / "in" / "masks" / f"{number}.png")
    assert main(["convert-data", "masks", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["foreground", "3,072"] in rows


def test_show_draws_boxes_without_masks_too(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in (yolo / "labels").iterdir():
        label.write_text("0 0.5 0.5 0.5 0.5\n0 0.1 0.1 0.4 0.1 0.4 0.4\n")
    assert main(["convert-data", "yolo", str(yolo), str(tmp_path / "out")]) == 0
    assert main(["show", str(tmp_path / "out"), "--out", str(tmp_path / "pictures"), "--json"]) == 0
    found = capsys.readouterr()
    assert '"2 x cat"' in found.out
    assert "3 of 6 objects of" in found.err


def test_convert_data_without_a_format_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-data"]) == 2
    assert "voc|yolo|labelme|masks" in capsys.readouterr().err


def test_show_draws_what_convert_data_wrote(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert-data", "yolo", str(yolo), str(tmp_path / "out")]) == 0
    assert main(["show", str(tmp_path / "out"), "--out", str(tmp_path / "pictures"), "--count", "2"]) == 0
    assert "1 x cat" in capsys.readouterr().out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
