"""`predict_dense`: objects and segmentation maps, drawings and COCO files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image

from lightspine.data.detection import decode_segmentation
from lightspine.dense import load_network
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import evaluate_segmenter, predict_dense
from support.dense_files import detector_file, segmenter_file
from support.images import write_image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("images") / "cat.png", (90, 60, 200), size=(97, 65), seed=3)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "detector.safetensors"
    return detector_file(path, ["cat", "dog"], head="mask_rcnn")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "segmenter.safetensors"
    return segmenter_file(path, ["sky", "sea", "land"])


def test_objects_are_those_of_the_network(detector: Path, image: Path) -> None:
    [found] = predict_dense(detector, [image], score_threshold=0.0)
    pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1) / 255
    with torch.inference_mode():
        expected: Any = load_network(detector)[0]([pixels])[0]  # type: ignore[arg-type]
    assert found.objects is not None
    assert [entry["score"] for entry in found.objects] == pytest.approx(expected["scores"].tolist(), abs=1e-6)
    assert [entry["name"] for entry in found.objects] == [
        ["cat", "dog"][label - 1] for label in expected["labels"].tolist()
    ]
    mask = decode_segmentation(found.objects[0]["mask"], 65, 97)
    assert np.array_equal(mask, (expected["masks"][0, 0] >= 0.5).numpy())


def test_only_likely_objects_are_told(detector: Path, image: Path) -> None:
    [found] = predict_dense(detector, [image], score_threshold=0.999)
    assert found.objects == []


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_picture_has_the_ratio_of_the_image(
    kind: str, image: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(kind)
    options = {"score_threshold": 0.0} if kind == "detector" else {}
    [found] = predict_dense(checkpoint, [image], out=tmp_path, **options)
    assert found.picture == tmp_path / "cat.png"
    with Image.open(found.picture) as picture:
        ratio = picture.width / picture.height
    # The legend of a segmentation map is on the right.
    assert ratio == pytest.approx(97 / 65, rel=0.02) if kind == "detector" else ratio > 97 / 65


def test_images_of_one_name_do_not_overwrite_each_other(segmenter: Path, image: Path, tmp_path: Path) -> None:
    other = write_image(tmp_path / "other" / "cat.png", (10, 200, 60), size=(64, 64), seed=1)
    found = predict_dense(segmenter, [image, other], out=tmp_path / "out")
    assert [entry.picture.name for entry in found if entry.picture] == ["cat.png", "cat_2.png"]


def test_label_map_holds_the_classes_and_their_shares(segmenter: Path, image: Path, tmp_path: Path) -> None:
    [found] = predict_dense(segmenter, [image], out=tmp_path, labels=True)
    values = np.asarray(Image.open(tmp_path / "cat_labels.png"))
    assert values.shape == (65, 97)
    names = ["sky", "sea", "land"]
    counted = {names[number]: float((values == number).mean()) for number in np.unique(values)}
    assert found.shares == pytest.approx(counted)


def test_coco_results_are_read_back_by_the_scorer(detector: Path, image: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    [found] = predict_dense(detector, [image], coco=file, score_threshold=0.0)
    listing = json.loads((tmp_path / "found_images.json").read_text())
    assert listing["images"] == [{"id": 1, "file_name": str(image)}]
    truth = COCO(listing | {"annotations": [], "info": {}})
    loaded = truth.loadRes(json.loads(file.read_text()))
    assert found.objects is not None
    assert len(loaded.anns) == len(found.objects) > 0


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("detector", {"labels": True}, "expected an output folder .* for the label maps"),
        ("detector", {"labels": True, "out": "x"}, "labels does not apply to the detector in"),
        ("detector", {"flip": True}, "flip does not apply to the detector in"),
        ("segmenter", {"coco": "x.json"}, "coco does not apply to the segmenter in"),
        ("segmenter", {"score_threshold": 0.9}, "score_threshold does not apply to the segmenter in"),
        ("segmenter", {"scale": (64, 64), "own_size": True}, "either own_size or a scale"),
        ("detector", {"resize": (90, 60)}, "the shorter side first"),
    ],
)
def test_option_without_a_use_is_refused(
    kind: str, options: dict[str, Any], sentence: str, image: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UsageError, match=sentence):
        predict_dense(request.getfixturevalue(kind), [image], **options)


def test_file_that_is_no_image_is_named(segmenter: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("no image")
    with pytest.raises(LightspineError, match=r"cannot read image .*a\.png"):
        predict_dense(segmenter, [path])


def test_most_objects_are_those_asked_for(detector: Path, image: Path) -> None:
    [found] = predict_dense(detector, [image], score_threshold=0.0, detections_per_image=2)
    assert found.objects is not None
    assert len(found.objects) == 2


def test_resized_image_gives_the_objects_of_a_network_of_that_size(detector: Path, image: Path) -> None:
    [found] = predict_dense(detector, [image], score_threshold=0.0, resize=(48, 80))
    pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1) / 255
    with torch.inference_mode():
        expected: Any = load_network(detector, resize=(48, 80))[0]([pixels])[0]  # type: ignore[arg-type]
    assert found.objects is not None
    assert [entry["score"] for entry in found.objects] == pytest.approx(expected["scores"].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"scale": (48, 48)}, {"window": (32, 32)}, {"ratios": (0.5, 1.0)}, {"flip": True}],
    ids=lambda options: next(iter(options)),
)
def test_way_of_looking_is_that_of_the_evaluation(
    options: dict[str, Any], segmenter: Path, image: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        for folder in ("images", "annotations"):
            (tmp_path / folder / split).mkdir(parents=True)
        (tmp_path / "images" / split / "cat.png").write_bytes(image.read_bytes())
    # With the detections as ground truth, an evaluation of the same detector is perfect.
    [found] = predict_dense(segmenter, [image], out=tmp_path / "out", labels=True, **options)
    labels = (tmp_path / "out" / "cat_labels.png").read_bytes()
    for split in ("train", "val"):
        (tmp_path / "annotations" / split / "cat.png").write_bytes(labels)
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    assert found.shares is not None
    assert evaluate_segmenter(segmenter, tmp_path, **options)["scores"]["aAcc"] == pytest.approx(100)
    assert evaluate_segmenter(segmenter, tmp_path)["scores"]["aAcc"] < 100
