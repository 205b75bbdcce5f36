"""SegmentationMetrics: mIoU, mAcc and aAcc."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightspine.data.segmentation import scan_segmentation_folder
from lightspine.dense.metrics import SegmentationMetrics
from lightspine.errors import LightspineError, UsageError
from support.coco import unpack

NAMES = ["sky", "road", "tree", "car"]


def _scored(predictions: Tensor, labels: Tensor) -> SegmentationMetrics:
    metrics = SegmentationMetrics(NAMES)
    metrics.update(map(str, range(len(labels))), predictions, labels)
    return metrics


def _brute_force(predictions: list[np.ndarray], labels: list[np.ndarray], count: int) -> dict[str, float]:
    """Compute the metrics class by class from all pixels."""
    truth = np.concatenate([array.ravel() for array in labels])
    found = np.concatenate([array.ravel() for array in predictions])[truth != 255]
    truth = truth[truth != 255]
    ious, accuracies = [], []
    for number in range(count):
        either = ((truth == number) | (found == number)).sum()
        both = ((truth == number) & (found == number)).sum()
        if either:
            ious.append(both / either)
        if (truth == number).any():
            accuracies.append(both / (truth == number).sum())
    return {
        "mIoU": 100 * float(np.mean(ious)),
        "mAcc": 100 * float(np.mean(accuracies)),
        "aAcc": 100 * float((truth == found).mean()),
    }


def test_scores_of_real_labels_with_mistakes_equal_a_brute_force_count(tmp_path_factory: Any) -> None:
    splits = scan_segmentation_folder(unpack("coco_free_semantic", tmp_path_factory))
    rng = np.random.default_rng(0)
    labels = [splits.reader.read(pair.labels) for pair in splits.val]
    present = np.setdiff1d(np.unique(np.concatenate([array.ravel() for array in labels])), [255])
    predictions = []
    for array in labels:
        mistakes = rng.choice(present, array.shape)
        predictions.append(np.where((rng.random(array.shape) < 0.7) & (array != 255), array, mistakes))
    metrics = SegmentationMetrics(splits.class_names)
    names = [str(pair.image) for pair in splits.val]
    metrics.update(names, map(torch.from_numpy, predictions), map(torch.from_numpy, labels))
    expected = _brute_force(predictions, labels, len(splits.class_names))
    assert 5 < expected["mIoU"] < 95, "a score that tells nothing"
    assert metrics.compute() == pytest.approx(expected)


def test_the_truth_scores_100_percent() -> None:
    labels = torch.randint(0, 4, (3, 20, 30))
    assert _scored(labels, labels).compute() == {"mIoU": 100, "mAcc": 100, "aAcc": 100}


def test_ignored_pixels_do_not_count() -> None:
    labels = torch.tensor([[[0, 1, 255, 255]]])
    metrics = _scored(torch.tensor([[[0, 1, 2, 3]]]), labels)
    assert metrics.compute()["mIoU"] == 100
    assert metrics.confusion().sum() == 2


def test_class_that_is_only_predicted_counts_in_the_mean_iou() -> None:
    metrics = _scored(torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([[[0, 0, 0, 0]]]))
    assert metrics.compute() == {"mIoU": 37.5, "mAcc": 75, "aAcc": 75}


def test_image_that_is_added_again_counts_once() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    metrics = _scored(labels, labels)
    metrics.update(["0"], labels, labels)
    assert (metrics.num_images, int(metrics.confusion().sum())) == (1, 16)


def test_per_class_has_a_row_of_every_class() -> None:
    rows = _scored(torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 0, 0, 0]]])).per_class()
    assert [row["name"] for row in rows] == NAMES
    assert [row["IoU"] for row in rows] == [50, 0, None, None]
    assert [row["accuracy"] for row in rows] == [50, None, None, None]
    assert [(row["pixels"], row["predicted"]) for row in rows[:2]] == [(4, 2), (0, 2)]


@pytest.mark.parametrize(
    ("prediction", "label", "sentence"),
    [(4, 0, "predicted class of 0 from 0 to 3, got 4 to 4"), (0, 7, "label of 0 from 0 to 3, got 7 to 7")],
)
def test_add_of_a_class_that_does_not_exist_fails(prediction: int, label: int, sentence: str) -> None:
    with pytest.raises(LightspineError, match=sentence):
        _scored(torch.full((1, 2, 2), prediction), torch.full((1, 2, 2), label))


def test_add_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"labels' size \(2, 2\) for 0, got \(2, 3\)"):
        _scored(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2))


def test_scores_without_a_labelled_pixel_fail() -> None:
    with pytest.raises(LightspineError, match="no labeled pixel in 1 images"):
        _scored(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 255)).compute()


def test_scores_without_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one class"):
        SegmentationMetrics([])


def test_precision_and_f1_of_a_class_are_those_of_its_pixels() -> None:
    labels = torch.tensor([[[0, 0, 0, 1], [1, 255, 2, 2]]])
    predictions = torch.tensor([[[0, 0, 1, 1], [0, 0, 2, 0]]])
    sky, road, tree, car = _scored(predictions, labels).per_class()
    # sky: 3 labeled, 4 predicted, 2 of them right (the ignored pixel does not count).
    assert (sky["precision"], sky["accuracy"], sky["F1"]) == pytest.approx((50, 200 / 3, 400 / 7))
    assert (road["precision"], road["F1"]) == (50, 50)
    assert (tree["precision"], tree["F1"]) == pytest.approx((100, 200 / 3))
    assert (car["precision"], car["F1"]) == (None, None)


def test_majority_baseline_is_the_score_of_the_largest_class() -> None:
    labels = torch.tensor([[[0, 0, 0, 1], [1, 255, 2, 2]]])
    baseline = _scored(torch.full_like(labels, 3), labels).majority_baseline()
    constant = _scored(torch.zeros_like(labels), labels).compute()
    assert baseline == {"class": "sky"} | constant
