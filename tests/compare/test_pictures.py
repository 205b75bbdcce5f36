from pathlib import Path

import pytest
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from PIL import Image

from lightspine.compare.contact_sheet import draw_contact_sheet
from lightspine.compare.plot import Point, plot_accuracy_against_latency
from lightspine.errors import UsageError
from lightspine.evaluation import ClassScore

CROWDED = [
    Point(
        name=f"efficientmodel_{index}",
        latency_ms=10 + 0.2 * index,
        accuracy=90 + 0.1 * index,
        params=5_000_000,
    )
    for index in range(6)
]
FAR = Point(name="other", latency_ms=40, accuracy=80, params=90_000_000)


def _label_boxes(points: list[Point], path: Path) -> list[Bbox]:
    figure = plot_accuracy_against_latency(points, path, title="title", caption="caption")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    return [
        child.get_window_extent(renderer)
        for child in figure.axes[0].get_children()
        if isinstance(child, Annotation)
    ]


def test_every_model_has_its_label(tmp_path: Path) -> None:
    assert len(_label_boxes([*CROWDED, FAR], tmp_path / "plot.png")) == len(CROWDED) + 1


def test_labels_of_crowded_models_do_not_overlap(tmp_path: Path) -> None:
    boxes = _label_boxes([*CROWDED, FAR], tmp_path / "plot.png")
    overlaps = [
        (first, second)
        for position, first in enumerate(boxes)
        for second in boxes[:position]
        if (shared := Bbox.intersection(first, second)) is not None and shared.width * shared.height > 1
    ]
    assert overlaps == []


def test_one_model_is_drawn(tmp_path: Path) -> None:
    plot_accuracy_against_latency([FAR], tmp_path / "plot.png", title="title", caption="caption")
    with Image.open(tmp_path / "plot.png") as image:
        assert len(image.convert("L").histogram()) - image.convert("L").histogram().count(0) > 10


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one finished model"):
        plot_accuracy_against_latency([], tmp_path / "plot.png", title="title", caption="caption")


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
    with pytest.raises(UsageError, match="every one of 2 images"):
        _texts([ClassScore("cat", 0.9)], tmp_path / "sheet.png")
