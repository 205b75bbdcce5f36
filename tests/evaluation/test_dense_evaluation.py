"""Evaluation reports of detectors and segmenters against hand-computed scores."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.data.detection import DetectionDataset, read_coco
from lightspine.data.segmentation import (
    SlidingWindowInference,
    create_segmentation_eval_transform,
    scan_segmentation_folder,
)
from lightspine.data.segmentation.dataset import SegmentationDataset
from lightspine.data.transforms import Preprocessing
from lightspine.dense import load_network
from lightspine.dense.metrics import CocoMetrics, SegmentationMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import evaluate_detector, evaluate_segmenter, write_dense_report
from lightspine.evaluation.segmentation import MULTI_SCALE
from support.coco import content, square, unpack, write_coco
from support.dense_files import PREPROCESSING, detector_file, segmenter_file


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("fixtures_tiny", tmp_path_factory)


@pytest.fixture(scope="module")
def coco(fixtures: Path) -> dict[str, Any]:
    return {"data": fixtures / "coco" / "instances.json", "images": fixtures / "coco" / "images"}


@pytest.fixture(scope="module")
def detector(coco: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = read_coco(coco["data"], coco["images"]).class_names
    return detector_file(tmp_path_factory.mktemp("files") / "detector.safetensors", names, head="mask_rcnn")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("coco_free_semantic", tmp_path_factory)


@pytest.fixture(scope="module")
def segmenter(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = scan_segmentation_folder(labelled).class_names
    return segmenter_file(tmp_path_factory.mktemp("files") / "segmenter.safetensors", names)


@pytest.fixture(scope="module")
def segmenter_report(segmenter: Path, labelled: Path) -> dict[str, Any]:
    return evaluate_segmenter(segmenter, labelled)


@pytest.fixture(scope="module")
def report(detector: Path, coco: dict[str, Any]) -> dict[str, Any]:
    return evaluate_detector(detector, **coco)


def test_detector_has_the_scores_that_are_counted_by_hand(
    report: dict[str, Any], detector: Path, coco: dict[str, Any]
) -> None:
    annotations = read_coco(coco["data"], coco["images"])
    metrics, network = CocoMetrics(annotations), load_network(detector)[0]
    with torch.inference_mode():
        for item in DetectionDataset(annotations):
            assert item.image is not None
            metrics.update([int(item.target["image_id"])], network([item.image]))  # type: ignore[arg-type]
    assert report["scores"] == metrics.compute()
    assert report["images"] == len(annotations)


def test_report_tells_what_it_takes_to_repeat_it(report: dict[str, Any]) -> None:
    assert len(report["checkpoint_sha256"]) == len(report["data_sha256"]) == 64
    assert report["options"]["resize"] == (64, 96)
    assert report["versions"].keys() >= {"lightspine", "torch"}
    assert report["throughput"]["seconds"].keys() == {"reading", "network", "scoring"}
    assert json.loads(json.dumps(report))["head"] == "mask_rcnn"


def test_options_replace_those_of_the_checkpoint(
    detector: Path, coco: dict[str, Any], tmp_path: Path
) -> None:
    results = tmp_path / "detections.json"
    report = evaluate_detector(
        detector, **coco, detections_per_image=2, score_threshold=0.001, resize=(48, 64), results=results
    )
    found = json.loads(results.read_text())
    assert max([entry["image_id"] for entry in found].count(i["image_id"]) for i in found) <= 2
    assert report["options"]["resize"] == (48, 64)


def test_files_of_a_detectors_report(report: dict[str, Any], tmp_path: Path) -> None:
    written = write_dense_report(report, tmp_path / "report")
    with written["classes.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(report["classes"])
    assert rows[0].keys() == {"class", "name", "box_AP", "mask_AP"}
    assert json.loads(written["report.json"].read_text())["scores"] == report["scores"]


def test_split_of_a_coco_folder_is_found(tmp_path: Path) -> None:
    described = content(square(), images=1)
    for split in ("train", "val2017"):
        write_coco(tmp_path / split, described).rename(tmp_path / f"{split}.json")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"{split}.json").rename(tmp_path / "annotations" / f"instances_{split}.json")
    checkpoint = detector_file(tmp_path / "detector.safetensors", ["cat", "dog"])
    assert evaluate_detector(checkpoint, tmp_path)["data"].endswith("instances_val2017.json")
    assert evaluate_detector(checkpoint, tmp_path, split="train")["data"].endswith("instances_train.json")
    from_file = evaluate_detector(checkpoint, tmp_path / "annotations" / "instances_train.json")
    assert from_file["images"] == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"split": "fog"}, "expected a split 'fog' in .*, found val2017"),
        ({"data": "nothing"}, "expected a COCO file or a folder with annotations/instances_SPLIT.json"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_wrong_place_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = write_coco(tmp_path / "val2017", content(square()))
    (tmp_path / "annotations").mkdir()
    file.rename(tmp_path / "annotations" / "instances_val2017.json")
    checkpoint = detector_file(tmp_path / "detector.safetensors", ["cat", "dog"])
    with pytest.raises(UsageError, match=sentence):
        evaluate_detector(checkpoint, **{"data": tmp_path} | change)


def test_category_that_the_detector_lacks_is_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path, content(square()))
    checkpoint = detector_file(tmp_path / "detector.safetensors", ["cat", "wolf"])
    with pytest.raises(UsageError, match=r"category 'dog' .* is not among the model's 2 classes"):
        evaluate_detector(checkpoint, file, images=tmp_path)


def test_damaged_image_is_skipped_and_named(tmp_path: Path) -> None:
    file = write_coco(tmp_path, content(square(), images=2))
    (tmp_path / "2.jpg").write_bytes(b"no image")
    checkpoint = detector_file(tmp_path / "detector.safetensors", ["cat", "dog"])
    report = evaluate_detector(checkpoint, file, images=tmp_path)
    assert (report["images"], list(report["skipped"])) == (1, [str(tmp_path / "2.jpg")])
    written = write_dense_report(report, tmp_path / "report")
    assert "2.jpg" in written["skipped.csv"].read_text()


def test_nothing_but_damaged_images_fails(tmp_path: Path) -> None:
    file = write_coco(tmp_path, content(square()))
    (tmp_path / "1.jpg").write_bytes(b"no image")
    checkpoint = detector_file(tmp_path / "detector.safetensors", ["cat", "dog"])
    with pytest.raises(LightspineError, match=r"none of the images of .* can be used"):
        evaluate_detector(checkpoint, file, images=tmp_path)


def test_segmenter_has_the_scores_that_are_counted_by_hand(
    segmenter_report: dict[str, Any], segmenter: Path, labelled: Path
) -> None:
    splits = scan_segmentation_folder(labelled)
    transform = create_segmentation_eval_transform(Preprocessing.from_config(PREPROCESSING), scale=(96, 64))
    metrics, network = SegmentationMetrics(splits.class_names), load_network(segmenter)[0]
    with torch.inference_mode():
        for item in SegmentationDataset(splits.val, splits.reader, transform):
            assert item.image is not None
            assert item.labels is not None
            found = SlidingWindowInference().classify(network, item.image, tuple(item.labels.shape))  # type: ignore[arg-type]
            metrics.update([item.name], [found], [item.labels])
    assert segmenter_report["scores"] == metrics.compute()
    assert segmenter_report["classes"] == metrics.per_class()


def test_files_of_a_segmenters_report(segmenter_report: dict[str, Any], tmp_path: Path) -> None:
    written = write_dense_report(segmenter_report, tmp_path)
    assert written.keys() == {"report.json", "classes.csv", "confusion.png"}
    with written["classes.csv"].open() as file:
        assert len(list(csv.DictReader(file))) == 133


def test_few_classes_have_a_confusion_picture(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "val", content(square()))
    checkpoint = segmenter_file(tmp_path / "segmenter.safetensors", ["background", "cat", "dog"])
    (tmp_path / "annotations").mkdir()
    file.rename(tmp_path / "annotations" / "instances_val.json")
    report = evaluate_segmenter(checkpoint, tmp_path)
    assert [row["pixels"] for row in report["classes"]][1] == 0
    assert write_dense_report(report, tmp_path / "report")["confusion.png"].stat().st_size > 5000


def test_way_of_looking_replaces_that_of_the_checkpoint(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "val", content(square()))
    (tmp_path / "annotations").mkdir()
    file.rename(tmp_path / "annotations" / "instances_val.json")
    names = ["background", "cat", "dog"]
    checkpoint = segmenter_file(tmp_path / "segmenter.safetensors", names, window=[32, 32], stride=[16, 16])
    plain = evaluate_segmenter(checkpoint, tmp_path)["settings"]
    assert (plain["window"], plain["stride"], plain["ratios"], plain["flip"]) == (
        (32, 32),
        (16, 16),
        (1.0,),
        False,
    )
    other = evaluate_segmenter(
        checkpoint, tmp_path, window=(48, 36), scale=(80, 60), ratios=MULTI_SCALE, flip=True
    )["settings"]
    assert (other["window"], other["stride"], other["scale"], other["flip"]) == (
        (48, 36),
        (32, 24),
        [80, 60],
        True,
    )
    assert other["ratios"] == MULTI_SCALE


def test_images_are_left_at_their_own_size(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "val", content(square()))
    (tmp_path / "annotations").mkdir()
    file.rename(tmp_path / "annotations" / "instances_val.json")
    checkpoint = segmenter_file(tmp_path / "segmenter.safetensors", ["background", "cat", "dog"])
    own = evaluate_segmenter(checkpoint, tmp_path, own_size=True)
    # The images of this file are 64 x 48 px.
    fitted = evaluate_segmenter(checkpoint, tmp_path, scale=(64, 48))
    assert own["settings"]["scale"] is None
    assert own["confusion"] == fitted["confusion"] != evaluate_segmenter(checkpoint, tmp_path)["confusion"]


def test_other_classes_than_the_segmenters_are_refused(labelled: Path, tmp_path: Path) -> None:
    checkpoint = segmenter_file(tmp_path / "segmenter.safetensors", ["sky", "sea"])
    with pytest.raises(UsageError, match=r"expected the 2 classes of the checkpoint in .*, got 133"):
        evaluate_segmenter(checkpoint, labelled)


def test_kinds_are_not_mixed_up(
    detector: Path, segmenter: Path, labelled: Path, coco: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"expected a segmenter in .*, got mask_rcnn over"):
        evaluate_segmenter(detector, labelled)
    with pytest.raises(UsageError, match=r"expected a detector in .*, got semantic_fpn over"):
        evaluate_detector(segmenter, **coco)
