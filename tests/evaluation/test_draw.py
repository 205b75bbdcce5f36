"""Drawings of detections and segmentation maps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightspine.analysis.figure_grid import Panel, draw_grid
from lightspine.compare.contact_sheet import draw_contact_sheet
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import ClassScore, draw
from lightspine.evaluation.draw import draw_classes, draw_detections

GREY = Image.new("RGB", (640, 480), (120, 120, 120))
NAMES = ["sky", "road", "tree"]


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).astype(int)


def _detections(**changes: Any) -> dict[str, Any]:
    masks = np.zeros((2, 480, 640))
    masks[0, 100:200, 100:300] = 1
    masks[1, 250:450, 350:600] = 1
    return {
        "boxes": np.array([[100, 100, 300, 200], [350, 250, 600, 450]]),
        "labels": np.array([1, 3]),
        "scores": np.array([0.9, 0.3]),
        "masks": masks,
    } | changes


def test_detections_are_drawn_where_they_are(tmp_path: Path) -> None:
    assert draw_detections(GREY, _detections(), NAMES, tmp_path / "a.png") == 1
    picture = _read(tmp_path / "a.png")
    assert picture.shape == (480, 640, 3)
    changed = np.abs(picture - 120).max(axis=2) > 20
    assert changed[100:200, 100:300].mean() > 0.9
    changed[80:220, 80:320] = False
    assert not changed.any(), "the second one's score is below the least"


def test_detections_without_masks_leave_the_inside_of_boxes(tmp_path: Path) -> None:
    found = _detections()
    del found["masks"], found["scores"]
    assert draw_detections(GREY, found, NAMES, tmp_path / "a.png") == 2
    picture = _read(tmp_path / "a.png")
    assert (picture[300:440, 360:590] == 120).all()
    for border in (picture[246:254, 400:600], picture[300:440, 346:354]):
        assert (border > 180).all(axis=2).any()


def test_detections_are_legible_without_colour(tmp_path: Path) -> None:
    draw_detections(GREY, _detections(masks=np.zeros((2, 480, 640))), NAMES, tmp_path / "a.png")
    edge = _read(tmp_path / "a.png")[150, 90:110].mean(axis=1)
    assert edge.max() - edge.min() > 100, "a dark and a light line"


def test_no_detection_leaves_the_image(tmp_path: Path) -> None:
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    assert draw_detections(GREY, nothing, NAMES, tmp_path / "a.png") == 0
    assert (_read(tmp_path / "a.png") == 120).all()


def test_detections_with_masks_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"masks of the image's size \(480, 640\), got \(10, 10\)"):
        draw_detections(GREY, _detections(masks=np.zeros((2, 10, 10))), NAMES, tmp_path / "a.png")


def _classes() -> np.ndarray:
    classes = np.zeros((480, 640), dtype=np.uint8)
    classes[240:] = 1
    classes[:, 500:] = 255
    return classes


def test_classes_are_coloured_but_for_the_ignored(tmp_path: Path) -> None:
    draw_classes(GREY, _classes(), NAMES, tmp_path / "a.png")
    picture = _read(tmp_path / "a.png")
    assert picture.shape[1] > 640, "a legend stands beside the image"
    assert np.abs(picture[50, 50] - picture[450, 50]).max() > 50
    assert (picture[:, 510:640] == 120).all()


def test_legend_names_the_ignored_pixels(tmp_path: Path) -> None:
    some, none = _classes(), np.minimum(_classes(), 1)
    marks = []
    for number, classes in enumerate((some, none)):
        draw_classes(GREY, classes, NAMES, tmp_path / f"{number}.png")
        legend = _read(tmp_path / f"{number}.png")[:, 660:]
        marks.append(int((legend < 200).any(axis=(1, 2)).sum()))
    assert marks[0] > marks[1] + 8, "one more line of text"


def test_classes_are_legible_without_colour(tmp_path: Path) -> None:
    draw_classes(GREY, _classes(), NAMES, tmp_path / "a.png")
    grey = _read(tmp_path / "a.png").mean(axis=2)
    assert abs(np.median(grey[20:200, 20:480]) - np.median(grey[260:460, 20:480])) > 15


def test_small_image_is_enlarged(tmp_path: Path) -> None:
    draw_classes(GREY.resize((64, 48)), _classes()[::10, ::10], NAMES, tmp_path / "a.png")
    assert _read(tmp_path / "a.png").shape[0] == 480


def test_classes_without_a_labelled_pixel_leave_the_image(tmp_path: Path) -> None:
    draw_classes(GREY, np.full((480, 640), 255), NAMES, tmp_path / "a.png")
    assert (_read(tmp_path / "a.png")[:, :640] == 120).all()


@pytest.mark.parametrize(
    ("classes", "options", "sentence"),
    [
        (np.zeros((10, 10)), {}, r"image's size \(480, 640\), got \(10, 10\)"),
        (np.full((480, 640), 3), {}, "classes from 0 to 2, got 3"),
        (_classes(), {"opacity": 2}, "opacity from 0 to 1, got 2"),
    ],
)
def test_classes_that_do_not_fit_are_refused(
    classes: np.ndarray, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=sentence):
        draw_classes(GREY, classes, NAMES, tmp_path / "a.png", **options)


def test_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LightspineError, match="cannot write"):
        draw_classes(GREY, _classes(), NAMES, tmp_path / "file" / "a.png")


def _crowd(count: int) -> dict[str, Any]:
    boxes = np.array([[100 + 4 * i, 100 + 4 * i, 300, 300] for i in range(count)])
    return {"boxes": boxes, "labels": np.ones(count, int), "scores": np.linspace(0.9, 0.6, count)}


def test_labels_of_overlapping_boxes_do_not_cover_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = []
    save = draw._save

    def keep(figure: Any, path: Path) -> None:
        save(figure, path)
        extents.extend(text.get_window_extent() for text in figure.axes[0].texts)

    monkeypatch.setattr(draw, "_save", keep)
    draw_detections(GREY, _crowd(8), NAMES, tmp_path / "a.png")
    assert len(extents) == 8
    for i, first in enumerate(extents):
        assert not any(first.overlaps(other) for other in extents[i + 1 :])


def test_number_of_drawn_detections_is_limited_by_score(tmp_path: Path) -> None:
    found = _detections(scores=np.array([0.7, 0.9]))
    del found["masks"]
    assert draw_detections(GREY, found, NAMES, tmp_path / "a.png", max_drawn=1) == 1
    picture = _read(tmp_path / "a.png")
    assert (picture[100:200, 100:300] == 120).all()
    assert (picture[465:, 560:] != 120).any(), "a note says how many are drawn"
    with pytest.raises(UsageError, match="max_drawn of at least 1, got 0"):
        draw_detections(GREY, found, NAMES, tmp_path / "a.png", max_drawn=0)


# matplotlib takes the first two for formulas and fails at the third and the first.
@pytest.mark.parametrize("name", [r"$\frac{$", "$5 or $6", "cat\udcff", "a\x1b[31m"])
def test_class_names_are_drawn_as_they_are_written(name: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (96, 64))
    found = {"boxes": [[8, 8, 60, 50]], "labels": [1], "scores": [0.9]}
    draw_detections(image, found, [name], tmp_path / "boxes.png")
    draw_classes(image, np.zeros((64, 96), dtype=np.uint8), [name], tmp_path / "classes.png")
    draw.draw_confusion_matrix([[3]], [name], tmp_path / "confusion.png", title=name)
    draw.draw_image_grid([image], [name], tmp_path / "images.png")
    draw_contact_sheet([image], [name], {name: [ClassScore(name, 0.9)]}, tmp_path / "sheet.png", title=name)
    draw_grid([[Panel(name, np.ones((4, 4)))]], names=[name], heading=name, caption=name)
    assert len(list(tmp_path.glob("*.png"))) == 5
