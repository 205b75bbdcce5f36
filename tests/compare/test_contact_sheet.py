"""Contact sheet (grid of predictions) of a comparison."""

from pathlib import Path

import pytest
from PIL import Image

from lightspine.compare.contact_sheet import draw_contact_sheet
from lightspine.errors import UsageError
from lightspine.evaluation import ClassScore


def _texts(answers: list[ClassScore], path: Path) -> list[str]:
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    figure = draw_contact_sheet(images, ["cat", "dog"], {"shvit_s1": answers}, path, title="title")
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_wrong_answer_is_crossed_and_right_one_is_not(tmp_path: Path) -> None:
    texts = _texts([ClassScore("cat", 0.9), ClassScore("cat", 0.6)], tmp_path / "sheet.png")
    assert "cat\n90 %" in texts
    assert "\N{MULTIPLICATION SIGN} cat\n60 %" in texts


def test_sheet_is_written_as_png(tmp_path: Path) -> None:
    _texts([ClassScore("cat", 0.9), ClassScore("dog", 0.6)], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG"


def test_missing_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a label and a prediction for each of 2 images"):
        _texts([ClassScore("cat", 0.9)], tmp_path / "sheet.png")
