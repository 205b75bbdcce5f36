"""Detector and segmenter evaluation: usage errors, and independence of the batch size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightspine.dense import load_network, save_network
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import evaluate_detector, evaluate_segmenter, predict_dense
from lightspine.evaluation.detection import detect_by_size, sort_by_size
from support.coco import content, square, write_coco
from support.dense_files import detector_file, segmenter_file
from support.images import write_image

NAMES = ["background", "cat", "dog"]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO folder with two images."""
    file = write_coco(tmp_path / "val", content(square(), images=2))
    (tmp_path / "annotations").mkdir()
    file.rename(tmp_path / "annotations" / "instances_val.json")
    return tmp_path


def _diverged(path: Path) -> Path:
    network, saved = load_network(path)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    return save_network(
        network,
        path.with_name("diverged.safetensors"),
        class_names=saved.class_names,
        preprocessing=saved.preprocessing,
        settings=saved.settings,
    )


def test_images_of_a_batch_are_seen_as_if_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN's rounding depends on the batch size, which reorders nearly equal scores of random weights.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    path = detector_file(tmp_path / "detector.safetensors", NAMES[1:], resize=None)
    detector: Any = load_network(path)[0]
    images = [torch.rand(3, height, width) for height, width in ((64, 64), (200, 330), (64, 64), (97, 65))]
    with torch.inference_mode():
        together = detect_by_size(detector, images)
        alone = [detector([image])[0] for image in images]
    for expected, found in zip(alone, together, strict=True):
        assert len(expected["boxes"]) == 5
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_size_of_a_batch_changes_no_detection(coco: Path) -> None:
    write_image(coco / "val" / "2.jpg", (90, 60, 200), size=(160, 40), seed=2)
    described = content(square(), square(id=2, image_id=2), images=2)
    described["images"][1] |= {"height": 40, "width": 160}
    (coco / "annotations" / "instances_val.json").write_text(json.dumps(described))
    checkpoint = detector_file(coco / "a.safetensors", NAMES[1:], resize=None, detections_per_image=100)
    found = []
    for size in (1, 2):
        evaluate_detector(checkpoint, coco, batch_size=size, results=coco / "results.json")
        entries = json.loads((coco / "results.json").read_text())
        found.append(np.array([[entry["score"], *entry["bbox"]] for entry in entries]))
    assert len(found[0]) > 100
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-3)


def test_images_of_one_size_follow_each_other_the_largest_first() -> None:
    sizes = np.array([[4, 6], [9, 9], [6, 4], [4, 6], [9, 9]])
    ordered = sizes[sort_by_size(sizes)].tolist()
    assert ordered[:2] == [[9, 9], [9, 9]]
    assert sorted(ordered[2:]) in (ordered[2:], ordered[2:][::-1])


@pytest.mark.parametrize("use", [evaluate_detector, evaluate_segmenter, predict_dense])
def test_weights_of_a_diverged_training_fail(use: Any, coco: Path) -> None:
    is_detector = use is evaluate_detector
    whole = (detector_file if is_detector else segmenter_file)(coco / "a.safetensors", NAMES[is_detector:])
    data = [coco / "val" / "1.jpg"] if use is predict_dense else coco
    checkpoint = _diverged(whole)
    with pytest.raises(LightspineError, match=r"diverged\.safetensors holds weights that are not finite"):
        use(checkpoint, data)


def test_segmenter_whose_logits_overflow_fails(coco: Path) -> None:
    path = segmenter_file(coco / "a.safetensors", NAMES)
    network, saved = load_network(path)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1e30)
    save_network(network, path, class_names=NAMES, preprocessing=saved.preprocessing, settings=saved.settings)
    with pytest.raises(LightspineError, match="gives logits that are not finite"):
        evaluate_segmenter(path, coco)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch size of at least 1 and 0 or more workers, got 0 and 0"),
        ({"num_workers": -1}, "batch size of at least 1 and 0 or more workers, got 1 and -1"),
        ({"score_threshold": 7.0}, "expected a score_threshold from 0 to 1, got 7.0"),
        ({"detections_per_image": 0}, "expected detections_per_image of at least 1, got 0"),
        ({"resize": (0, 9)}, "expected a resize of at least 1 px, the shorter side first, got 0 and 9"),
        ({"resize": (9, 8)}, "expected a resize of at least 1 px, the shorter side first, got 9 and 8"),
    ],
)
def test_value_that_finds_nothing_is_refused(options: dict[str, Any], sentence: str, coco: Path) -> None:
    checkpoint = detector_file(coco / "a.safetensors", NAMES[1:])
    with pytest.raises(UsageError, match=sentence):
        evaluate_detector(checkpoint, coco, **options)


def test_class_that_differs_is_named(coco: Path) -> None:
    checkpoint = segmenter_file(coco / "a.safetensors", NAMES)
    (coco / "images").mkdir()
    (coco / "val" / "1.jpg").rename(coco / "images" / "1.jpg")
    (coco / "val" / "2.jpg").rename(coco / "images" / "2.jpg")
    (coco / "annotations" / "instances_val.json").unlink()
    for number in (1, 2):
        Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(coco / "annotations" / f"{number}.png")
    (coco / "classes.txt").write_text("background\ncat\nwolf\n")
    with pytest.raises(UsageError, match="class 2 is 'wolf' there and 'dog' in the checkpoint"):
        evaluate_segmenter(checkpoint, coco)


def test_no_images_to_predict_are_refused(coco: Path) -> None:
    with pytest.raises(UsageError, match="expected at least one image, got none"):
        predict_dense(detector_file(coco / "a.safetensors", NAMES[1:]), [])
