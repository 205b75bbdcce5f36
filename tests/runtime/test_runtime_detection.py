"""`lightspine_runtime.Detections` and the drawing of detected objects."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightspine_runtime import Detections, DetectionSettings, LightspineError, UsageError, draw_detections
from lightspine_runtime.detection import place_label, resize_masks, resized_size


def detections(count: int = 2, masks: bool = False) -> Detections:
    boxes = np.float32([[10 * i + 4, 6, 10 * i + 12, 20] for i in range(count)]).reshape(-1, 4)
    found = np.zeros((count, 40, 50), np.bool_)
    found[:, 8:18, 5:11] = True
    return Detections(
        boxes=boxes,
        scores=np.float32([0.9 - 0.1 * i for i in range(count)]),
        labels=np.arange(1, count + 1),
        names=[f"class {i}" for i in range(count)],
        masks=found if masks else None,
    )


@pytest.mark.parametrize("masks", [False, True])
def test_objects_change_the_picture_around_their_boxes(masks: bool, tmp_path: Path) -> None:
    image = Image.new("RGB", (50, 40), (30, 30, 30))
    picture = draw_detections(image, detections(1, masks), tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(picture))
    assert picture.size == (640, 512)
    changed = (np.asarray(picture) != 30).any(-1)
    # The box from (4, 6) to (12, 20) at 12.8 times the size, and the inside of its mask.
    assert changed[77:256, 51].all()
    assert changed[150, 100] == masks
    assert not changed[300:, 300:].any()


def test_no_objects_leave_the_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (800, 700), (30, 30, 30))
    picture = draw_detections(image, detections(0, masks=True), tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(image))


def test_number_of_drawn_objects_is_checked() -> None:
    with pytest.raises(UsageError, match="expected max_drawn of at least 1, got 0"):
        draw_detections(Image.new("RGB", (50, 40)), detections(), max_drawn=0)


def test_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match=r"cannot write .*a\.unknown"):
        draw_detections(Image.new("RGB", (50, 40)), detections(), tmp_path / "a.unknown")


def test_objects_are_selected_with_their_masks() -> None:
    found = detections(3, masks=True).above(0.75)
    assert (len(found), found.names, found.masks is not None and len(found.masks)) == (
        2,
        ["class 0", "class 1"],
        2,
    )


@pytest.mark.parametrize("damage", [{"resize": [1]}, {"rounding": None, "resize": 5}, {"nms_threshold": "a"}])
def test_damaged_settings_are_refused(damage: dict[str, object]) -> None:
    whole = {
        "resize": None,
        "rounding": "nearest",
        "score_threshold": 0.05,
        "nms_threshold": 0.5,
        "detections_per_image": 100,
    }
    assert DetectionSettings.from_mapping(whole, "a.onnx").detections_per_image == 100
    with pytest.raises(LightspineError, match=r"a\.onnx has incomplete detection metadata"):
        DetectionSettings.from_mapping(whole | damage, "a.onnx")


def test_sides_are_rounded_as_in_training() -> None:
    settings = DetectionSettings(
        resize=(100, 160),
        rounding="nearest",
        score_threshold=0.05,
        nms_threshold=0.5,
        detections_per_image=100,
    )
    assert resized_size(30, 45, settings) == (100, 150)
    # The longer side is limited.
    assert resized_size(33, 100, settings) == (53, 160)


def test_masks_are_resized_with_the_image() -> None:
    masks = np.zeros((1, 20, 30), np.bool_)
    masks[0, 5:10, 6:18] = True
    resized = resize_masks(masks, 40, 60)
    assert resized.shape == (1, 40, 60)
    assert resized[0, 12:18, 14:34].all()
    assert resized.sum() == pytest.approx(4 * masks.sum(), rel=0.05)


def test_labels_of_objects_in_one_place_do_not_cover_each_other() -> None:
    placed: list[tuple[float, float, float, float]] = []
    for _ in range(6):
        placed.append(place_label([40, 30, 140, 130], 45, 14, (200, 160), placed))
    for place, one in enumerate(placed):
        assert 0 <= one[0] < one[2] <= 200
        assert 0 <= one[1] < one[3] <= 160
        for other in placed[:place]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_labels_of_equal_boxes_are_all_in_the_picture() -> None:
    image = Image.new("RGB", (640, 480))
    boxes = np.tile(np.array([[200, 150, 400, 350]], np.float32), (4, 1))

    def white(count: int) -> int:
        found = Detections(
            boxes=boxes[:count],
            scores=np.full(count, 0.5, np.float32),
            labels=np.ones(count, np.int64),
            names=["cat"] * count,
        )
        return int((np.asarray(draw_detections(image, found)) == 255).all(-1).sum())

    assert white(4) == 4 * white(1)
