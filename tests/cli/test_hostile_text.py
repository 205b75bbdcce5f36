"""Class names and file names with control characters: escaped in the terminal and in CSV files."""

import logging
from pathlib import Path

import pytest

from lightspine.training.log_filters import show_info_logs
from lightspine_cli.main import main
from support.checkpoints import save_small
from support.images import COLOURS, write_image

CLEAR = "\x1b[2J\x1b]0;title\x07"
CLASSES = [f"{CLEAR}red", "gr\reen", "\u202eblue"]
CONTROL = {"\x1b", "\x07", "\r", "\u202e"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and an image of hostile names."""
    folder = tmp_path_factory.mktemp("hostile")
    save_small(folder / "model.safetensors", classes=CLASSES)
    write_image(folder / "some" / f"{CLEAR}\r\u202e.png", COLOURS["red"])
    return folder


def _printed(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_predict_escapes_class_and_file_names(
    place: Path, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    (image,) = (place / "some").iterdir()
    assert main(["predict", str(image), "--checkpoint", str(place / "model.safetensors"), *flag]) == 0
    printed = _printed(capsys)
    assert "1b[2J" in printed
    assert not CONTROL & set(printed)


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_info_escapes_class_names(place: Path, capsys: pytest.CaptureFixture[str], flag: list[str]) -> None:
    assert main(["info", str(place / "model.safetensors"), *flag]) == 0
    printed = _printed(capsys)
    assert "1b[2J" in printed
    assert not CONTROL & set(printed)


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_error_escapes_the_file_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    file = tmp_path / f"{CLEAR}\u202e.pth"
    file.write_bytes(b"no checkpoint")
    assert main(["info", str(file), *options]) == 1
    printed = _printed(capsys)
    assert "\\x1b[2J" in printed
    assert not CONTROL & set(printed)


def test_csv_of_predictions_escapes_names(place: Path, tmp_path: Path) -> None:
    (place / "some" / f"{CLEAR}bad.png").write_bytes(b"no image")
    arguments = ["--checkpoint", str(place / "model.safetensors"), "--data", str(place / "some")]
    assert main(["predict", *arguments, "--out", str(tmp_path)]) == 0
    for name in ("predictions.csv", "bad_images.csv"):
        text = (tmp_path / name).read_bytes().decode()
        assert "\\x1b[2J" in text
        assert not CONTROL & set(text)


def test_evaluate_escapes_class_and_file_names(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        write_image(tmp_path / name / "0.png", COLOURS["red"])
    (tmp_path / CLASSES[0] / f"{CLEAR}bad.png").write_bytes(b"no image")
    arguments = ["--checkpoint", str(place / "model.safetensors"), "--data", str(tmp_path)]
    assert main(["evaluate", *arguments]) == 0
    printed = _printed(capsys)
    assert "\\x07red" in printed
    assert "\\x07bad" in printed
    assert not CONTROL & set(printed)


def test_log_of_a_run_escapes_names(capsys: pytest.CaptureFixture[str]) -> None:
    with show_info_logs():
        logging.getLogger("lightspine").warning("left out %s", CLEAR)
    assert capsys.readouterr().err == "left out \\x1b[2J\\x1b]0;title\\x07\n"
