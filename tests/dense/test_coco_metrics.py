"""CocoMetrics: COCO's 12 metrics equal those of pycocotools."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from lightspine.data.detection import CocoAnnotations, DetectionDataset
from lightspine.dense.metrics import METRIC_NAMES, CocoMetrics
from lightspine.errors import LightspineError, UsageError
from support.coco import read_small, real_annotations, real_files, square

Detections = dict[str, Tensor]


def _random_detections(annotations: CocoAnnotations) -> dict[int, Detections]:
    """Return detections made from perturbed ground truth: shifted, mislabeled, missing and false ones."""
    rng = np.random.default_rng(0)
    found = {}
    for position in range(len(annotations)):
        dataset = DetectionDataset(annotations)
        _, target, _ = dataset[position]
        height, width = target["masks"].shape[1:]
        chosen = torch.from_numpy(rng.permutation(np.repeat(np.arange(len(target["boxes"])), 2)))
        chosen = chosen[: int(0.8 * len(chosen))]
        count = len(chosen)
        sides = (target["boxes"][:, 2:] - target["boxes"][:, :2])[chosen].repeat(1, 2)
        moved = target["boxes"][chosen] + sides * torch.from_numpy(rng.normal(0, 0.06, (count, 4))).float()
        masks = target["masks"][chosen] * torch.from_numpy(rng.random((count, height, width)) < 0.8)
        labels = torch.where(torch.from_numpy(rng.random(count) < 0.9), target["labels"][chosen], 3)
        scores = torch.from_numpy(rng.random(count).round(2)).float()
        found[int(target["image_id"])] = {
            "boxes": moved,
            "labels": labels,
            "scores": scores,
            "masks": masks[:, None].float(),
        }
    return found


def _pycocotools(file: Path, results: list[dict[str, Any]], kind: str) -> np.ndarray:
    dropped, iou_type = {"box": ("segmentation", "bbox"), "mask": ("bbox", "segm")}[kind]
    entries = [{key: value for key, value in found.items() if key != dropped} for found in results]
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes(entries), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats


def _listed(scores: dict[str, float | None]) -> list[float]:
    return [-100.0 if scores[name] is None else scores[name] for name in METRIC_NAMES]


# pycocotools is built for an older numpy.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "val"])
def test_numbers_of_random_detections_equal_pycocotools(split: str, tmp_path_factory: Any) -> None:
    annotations = real_annotations("coco_free", split, tmp_path_factory)
    found = _random_detections(annotations)
    metrics = CocoMetrics(annotations)
    metrics.update(found, found.values())
    numbers = metrics.compute()
    file, _ = real_files("coco_free", split, tmp_path_factory)
    for kind in ("box", "mask"):
        expected = _pycocotools(file, metrics.results(), kind)
        assert 5 < expected[0] < 95, "a score that tells nothing"
        assert _listed(numbers[kind]) == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize(
    ("archive", "split"), [("coco_free", "train"), ("coco_free", "val"), ("fixtures_tiny", "nuclei")]
)
def test_the_truth_scores_100_percent(archive: str, split: str, tmp_path_factory: Any) -> None:
    annotations = real_annotations(archive, split, tmp_path_factory)
    metrics = CocoMetrics(annotations)
    for item in (DetectionDataset(annotations)[i] for i in range(len(annotations))):
        count = len(item.target["boxes"])
        metrics.update([int(item.target["image_id"])], [item.target | {"scores": torch.ones(count)}])
    for numbers in metrics.compute().values():
        assert numbers["AP"] == pytest.approx(100)
        assert numbers["AR"] == pytest.approx(100)
    assert all(
        value is None or value == pytest.approx(100)
        for numbers in metrics.per_class().values()
        for value in numbers.values()
    )


def _square(**changes: Any) -> Detections:
    masks = torch.zeros(1, 1, 48, 64)
    masks[:, :, 10:30, 10:30] = 0.9
    return {
        "boxes": torch.tensor([[10.0, 10, 30, 30]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.7]),
        "masks": masks,
    } | changes


def test_number_without_anything_to_average_is_none(tmp_path: Path) -> None:
    metrics = CocoMetrics(read_small(tmp_path, square()))
    metrics.update([1], [_square()])
    numbers = metrics.compute()["box"]
    assert (numbers["AP"], numbers["APs"], numbers["APl"]) == (pytest.approx(100), pytest.approx(100), None)
    assert metrics.per_class()["cat"] == {"box": None, "mask": None}


def test_scores_without_detections_are_zero(tmp_path: Path) -> None:
    assert CocoMetrics(read_small(tmp_path, square())).compute()["mask"]["AP"] == 0


def test_images_that_were_never_added_count(tmp_path: Path) -> None:
    metrics = CocoMetrics(read_small(tmp_path, square(), square(image_id=2), images=2))
    metrics.update([1], [_square()])
    assert metrics.compute()["box"]["AR"] == pytest.approx(50)
    assert metrics.num_images == 1


def test_image_that_is_added_again_counts_once(tmp_path: Path) -> None:
    metrics = CocoMetrics(read_small(tmp_path, square()))
    for label in (1, 2):
        metrics.update([1], [_square(labels=torch.tensor([label]))])
        metrics.compute()
    assert (len(metrics.results()), metrics.compute()["box"]["AP"]) == (1, pytest.approx(100))


def test_crowd_takes_detections_without_counting(tmp_path: Path) -> None:
    crowd = square(
        bbox=[0, 0, 64, 48], iscrowd=1, segmentation={"size": [48, 64], "counts": [0, 48 * 64]}, id=2
    )
    metrics = CocoMetrics(read_small(tmp_path, square(), crowd))
    inside = {name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in _square().items()}
    inside["boxes"] = torch.tensor([[10.0, 10, 30, 30], [40, 20, 50, 30], [2, 2, 8, 8]])
    inside["scores"] = torch.tensor([0.5, 0.9, 0.8])
    metrics.update([1], [inside])
    assert metrics.compute()["box"]["AP"] == pytest.approx(100)


def test_more_detections_than_100_count_where_asked_for(tmp_path: Path) -> None:
    boxes = torch.tensor([[x, y, x + 3.0, y + 3.0] for x in range(0, 60, 4) for y in range(0, 40, 4)])
    entries = [square(bbox=[x, y, 3, 3], id=i) for i, (x, y, _, _) in enumerate(boxes.tolist())]
    annotations = read_small(tmp_path, *entries, masks=False)
    found = {"boxes": boxes, "labels": torch.full((150,), 2), "scores": torch.linspace(1, 0.1, 150)}
    recalls = []
    for most in (100, 300):
        metrics = CocoMetrics(annotations, max_detections=most)
        metrics.update([1], [found])
        recalls.append(metrics.compute()["box"]["AR"])
    assert recalls == [pytest.approx(100 * 100 / 150), pytest.approx(100)]


def test_class_scores_follow_the_names_of_the_model(tmp_path: Path) -> None:
    annotations = read_small(
        tmp_path, square(), square(id=2, category_id=3), class_names=["dog", "bird", "cat"]
    )
    metrics = CocoMetrics(annotations)
    metrics.update([1], [_square(labels=torch.tensor([1]))])
    per_class = {name: numbers["box"] for name, numbers in metrics.per_class().items()}
    assert per_class == {"dog": pytest.approx(100), "bird": None, "cat": pytest.approx(0)}


def test_write_results_is_coco_json_with_masks(tmp_path: Path) -> None:
    metrics = CocoMetrics(read_small(tmp_path, square()))
    metrics.update([1], [_square()])
    metrics.write_results(tmp_path / "results.json")
    [entry] = json.loads((tmp_path / "results.json").read_text())
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (1, 7, [10, 10, 20, 20])
    assert pycocotools_mask.area(entry["segmentation"]) == 400


@pytest.mark.parametrize(
    ("image_id", "changes", "sentence"),
    [
        (9, {}, "unknown image id 9"),
        (1, {"labels": torch.tensor([3])}, "labels from 1 to 2, got 3 to 3"),
        (1, {"labels": torch.tensor([0])}, "labels from 1 to 2, got 0 to 0"),
        (1, {"masks": torch.zeros(1, 1, 64, 48)}, r"masks of size \(48, 64\)"),
    ],
)
def test_add_of_what_does_not_fit_is_refused(
    image_id: int, changes: Detections, sentence: str, tmp_path: Path
) -> None:
    metrics = CocoMetrics(read_small(tmp_path, square()))
    with pytest.raises(UsageError, match=sentence):
        metrics.update([image_id], [_square(**changes)])


def test_add_without_masks_where_they_are_scored_is_refused(tmp_path: Path) -> None:
    found = _square()
    del found["masks"]
    with pytest.raises(UsageError, match="have no masks"):
        CocoMetrics(read_small(tmp_path, square())).update([1], [found])


@pytest.mark.parametrize("part", ["boxes", "scores"])
def test_add_of_values_that_are_not_finite_fails(part: str, tmp_path: Path) -> None:
    broken = {part: _square()[part] * float("nan")}
    with pytest.raises(LightspineError, match="image 1 have boxes or scores that are not finite"):
        CocoMetrics(read_small(tmp_path, square())).update([1], [_square(**broken)])


def test_fewer_than_10_detections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 10, got 5"):
        CocoMetrics(read_small(tmp_path, square()), max_detections=5)


def test_best_f1_is_at_the_score_that_separates_right_from_wrong(tmp_path: Path) -> None:
    annotations = read_small(
        tmp_path,
        square(),
        square(id=2, bbox=[40, 10, 20, 20]),
        square(id=3, category_id=3, bbox=[0, 30, 9, 9]),
    )
    found = {
        "boxes": torch.tensor([[10.0, 10, 30, 30], [40, 10, 60, 30], [0, 0, 9, 9], [30, 30, 50, 45]]),
        "labels": torch.tensor([2, 2, 2, 2]),
        "scores": torch.tensor([0.9, 0.6, 0.5, 0.1]),
    }
    metrics = CocoMetrics(replace(annotations, segmentations=None))
    metrics.update([1], [found])
    best = metrics.best_f1()
    assert best["dog"]["box"] == pytest.approx({"precision": 100, "recall": 100, "F1": 100, "score": 0.6})
    assert best["cat"]["box"] is None
