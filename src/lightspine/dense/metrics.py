"""Detection metrics (COCO AP and AR) and segmentation metrics (mIoU), gathered across ranks."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from lightspine.data.detection import CocoAnnotations, encode_mask
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_write_text

Key = TypeVar("Key")
Value = TypeVar("Value")


def all_gather_by_image(results: dict[Key, Value]) -> dict[Key, Value]:
    """All-gather per-image results across ranks.

    An image that a distributed sampler repeats counts once, with the result of the lowest rank.
    Without a process group the results are returned unchanged.

    Args:
        results: image -> result of this rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return results
    parts: list[dict[Key, Value]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, results)
    return {key: value for part in reversed(parts) for key, value in part.items()}


Kind = Literal["box", "mask"]

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
"""COCO's 12 metrics: AP over IoU 0.5 to 0.95, at 0.5, at 0.75, for small (below 32 x 32 px), medium and large
(above 96 x 96 px) objects; AR with 1, 10 and all detections per image, for small, medium and large objects.
"""

_IOU_TYPES: dict[Kind, str] = {"box": "bbox", "mask": "segm"}


class CocoMetrics:
    """COCO average precision and recall of detections.

    Detections are stored per image: an image that is added twice, or by two ranks, counts once. Masks are
    run-length encoded when they are added.

    Args:
        annotations: ground truth; masks are evaluated if it was read with masks.
        max_detections: number of detections per image and class that count, the highest scores first. COCO
            uses 100; set more if images hold more objects.

    Raises:
        UsageError: max_detections below 10.
    """

    def __init__(self, annotations: CocoAnnotations, *, max_detections: int = 100) -> None:
        if max_detections < 10:
            raise UsageError(f"expected max_detections of at least 10, got {max_detections}")
        self.annotations = annotations
        self.max_detections = max_detections
        self.kinds: tuple[Kind, ...] = ("box",) if annotations.segmentations is None else ("box", "mask")
        self._image_ids = set(annotations.image_ids.tolist())
        self._images: dict[int, list[dict[str, Any]]] = {}
        self._evaluations: dict[Kind, Any] = {}

    def update(self, image_ids: Iterable[int], predictions: Iterable[Mapping[str, Tensor]]) -> None:
        """Add the detections of images.

        Args:
            image_ids: COCO id of each image.
            predictions: output of torchvision's detectors per image: `boxes` (N, 4), left, top, right, bottom
                in pixels of the original image; `scores` (N,); `labels` (N,), class + 1; if masks are
                evaluated `masks` (N, 1, H, W) or (N, H, W), probabilities that are thresholded at 0.5.

        Raises:
            UsageError: an unknown image, a label out of range, missing masks, or masks of another size than
                the image.
            LightspineError: a box or score that is not finite.
        """
        for image_id, found in zip(image_ids, predictions, strict=True):
            if image_id not in self._image_ids:
                raise UsageError(f"expected an image of the annotations, got the unknown image id {image_id}")
            self._images[int(image_id)] = self._to_results(int(image_id), found)
        self._evaluations.clear()

    def all_gather(self) -> None:
        """Merge the detections of all ranks; every rank must call it."""
        self._images = all_gather_by_image(self._images)
        self._evaluations.clear()

    @property
    def num_images(self) -> int:
        """Number of images with added detections."""
        return len(self._images)

    def results(self) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format, sorted by image."""
        return [found for image_id in sorted(self._images) for found in self._images[image_id]]

    def write_results(self, path: str | Path) -> None:
        """Write `results` as JSON.

        Raises:
            LightspineError: the file cannot be written.
        """
        atomic_write_text(Path(path), json.dumps(self.results()) + "\n")

    def compute(self) -> dict[Kind, dict[str, float | None]]:
        """Return `METRIC_NAMES` in percent for boxes and, if evaluated, masks.

        Images without detections count. A value is None if there is nothing to average, such as no large
        object. AR and the size-specific metrics use `max_detections`.
        """
        return {
            kind: {
                name: _percent(value)
                for name, value in zip(
                    METRIC_NAMES, self._evaluate(kind).stats[: len(METRIC_NAMES)], strict=True
                )
            }
            for kind in self.kinds
        }

    def per_class(self) -> dict[str, dict[str, float | None]]:
        """Return class name -> kind -> AP in percent, `None` for a class without objects."""
        per_class = {}
        for kind in self.kinds:
            # (IoU thresholds, recalls, classes, object sizes, maximum detections); -1 marks missing values.
            precision = self._evaluate(kind).eval["precision"][:, :, :, 0, -1]
            per_class[kind] = [
                _percent(float(values[values > -1].mean())) if (values > -1).any() else None
                for values in np.moveaxis(precision, 2, 0)
            ]
        order = np.argsort(np.argsort(self.annotations.category_ids)).tolist()
        return {
            name: {kind: per_class[kind][order[label]] for kind in self.kinds}
            for label, name in enumerate(self.annotations.class_names)
        }

    def best_f1(self) -> dict[str, dict[str, dict[str, float] | None]]:
        """Return class name -> kind -> the point of the precision-recall curve with the highest F1.

        `precision`, `recall` and `F1` in percent at IoU 0.5, from COCO's curve at 101 recalls, and `score`,
        the score threshold of that point; `None` for a class without objects or correct detections.
        """
        order = np.argsort(np.argsort(self.annotations.category_ids)).tolist()
        points = {}
        for kind in self.kinds:
            evaluation = self._evaluate(kind)
            # (recalls, classes) at the first IoU threshold, 0.5, for all object sizes.
            precision, scores = (evaluation.eval[name][0, :, :, 0, -1] for name in ("precision", "scores"))
            recall = np.asarray(evaluation.params.recThrs)
            points[kind] = [
                _highest_f1(curve, thresholds, recall)
                for curve, thresholds in zip(precision.T, scores.T, strict=True)
            ]
        return {
            name: {kind: points[kind][order[label]] for kind in self.kinds}
            for label, name in enumerate(self.annotations.class_names)
        }

    def _to_results(self, image_id: int, found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        boxes, scores = found["boxes"].detach().cpu().double(), found["scores"].detach().cpu().double()
        labels = found["labels"].cpu()
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise LightspineError(
                f"the detections of image {image_id} have boxes or scores that are not finite"
            )
        count = len(self.annotations.class_names)
        if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= count:
            raise UsageError(
                f"expected labels from 1 to {count}, got {int(labels.min())} to {int(labels.max())} in image "
                f"{image_id}"
            )
        sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        results: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": self.annotations.category_ids[int(labels[number]) - 1],
                "bbox": sides[number].tolist(),
                "score": float(scores[number]),
            }
            for number in range(len(boxes))
        ]
        if "mask" in self.kinds:
            masks = (self._check_masks(image_id, found) >= 0.5).cpu().numpy()
            for result, mask in zip(results, masks, strict=True):
                result["segmentation"] = encode_mask(mask)
        return results

    def _check_masks(self, image_id: int, found: Mapping[str, Tensor]) -> Tensor:
        if "masks" not in found:
            raise UsageError(f"the detections of image {image_id} have no masks, but masks are evaluated")
        position = int(np.flatnonzero(self.annotations.image_ids == image_id)[0])
        size = tuple(self.annotations.sizes[position].tolist())
        masks = found["masks"]
        masks = masks[:, 0] if masks.ndim == 4 else masks
        if tuple(masks.shape[1:]) != size:
            raise UsageError(
                f"expected masks of size {size} for image {image_id}, got {tuple(masks.shape[1:])}"
            )
        return masks.detach()

    def _evaluate(self, kind: Kind) -> Any:
        if kind in self._evaluations:
            return self._evaluations[kind]
        content = self.annotations.to_coco()
        truth = COCO(content)
        # Given both, faster-coco-eval would compute the area of a mask from its box.
        dropped = "segmentation" if kind == "box" else "bbox"
        detections = [
            {key: value for key, value in result.items() if key != dropped} for result in self.results()
        ]
        found = truth.loadRes(detections) if detections else COCO(content | {"annotations": []})
        evaluation = COCOeval_faster(truth, found, iouType=_IOU_TYPES[kind])
        evaluation.params.maxDets = [1, 10, self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        self._evaluations[kind] = evaluation
        return evaluation


def _highest_f1(precision: np.ndarray, scores: np.ndarray, recall: np.ndarray) -> dict[str, float] | None:
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).eps)
    best = int(f1.argmax())
    # -1 marks classes without objects; 0 everywhere is a class without a correct detection.
    if precision[best] <= 0:
        return None
    point = {"precision": precision[best], "recall": recall[best], "F1": f1[best]}
    return {name: 100 * float(value) for name, value in point.items()} | {"score": float(scores[best])}


def _percent(value: float) -> float | None:
    return None if math.isnan(value) or value < 0 else 100 * float(value)


class SegmentationMetrics:
    """mIoU, mAcc and aAcc of semantic segmentation.

    The nonzero entries of the confusion matrix are stored per image: an image that is added twice, or by two
    ranks, counts once.

    Args:
        class_names: one name per label.
        ignored: label of ignored pixels (ignore index).

    Raises:
        UsageError: no class names.
    """

    def __init__(self, class_names: Sequence[str], *, ignored: int = 255) -> None:
        if not class_names:
            raise UsageError("expected at least one class, got none")
        self.class_names = list(class_names)
        self.ignored = ignored
        self._images: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def update(self, names: Iterable[str], predictions: Iterable[Tensor], labels: Iterable[Tensor]) -> None:
        """Add images.

        Args:
            names: unique image names, such as paths.
            predictions: predicted class of each pixel, each (H, W), integers.
            labels: true class of each pixel, each (H, W), integers.

        Raises:
            UsageError: a prediction of another size than its labels.
            LightspineError: a class out of range.
        """
        count = len(self.class_names)
        for name, prediction, truth in zip(names, predictions, labels, strict=True):
            if prediction.shape != truth.shape:
                raise UsageError(
                    f"expected a prediction of the labels' size {tuple(truth.shape)} for {name}, got "
                    f"{tuple(prediction.shape)}"
                )
            valid = truth != self.ignored
            found, true = prediction[valid].long(), truth[valid].long()
            for kind, classes in (("label", true), ("predicted class", found)):
                if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < count:
                    raise LightspineError(
                        f"expected every {kind} of {name} from 0 to {count - 1}, got "
                        f"{int(classes.min())} to {int(classes.max())}"
                    )
            pairs, pixels = torch.unique(true * count + found, return_counts=True)
            self._images[str(name)] = pairs.cpu().numpy(), pixels.cpu().numpy()

    def all_gather(self) -> None:
        """Merge the counts of all ranks; every rank must call it."""
        self._images = all_gather_by_image(self._images)

    @property
    def num_images(self) -> int:
        """Number of added images."""
        return len(self._images)

    def confusion(self) -> np.ndarray:
        """Return the confusion matrix in pixels, int64; rows are true classes, columns predicted ones."""
        count = len(self.class_names)
        total = np.zeros(count * count, dtype=np.int64)
        for pairs, pixels in self._images.values():
            total[pairs] += pixels
        return total.reshape(count, count)

    def compute(self) -> dict[str, float]:
        """Return `mIoU`, `mAcc` and `aAcc` in percent.

        mIoU is the mean over classes that are labeled or predicted anywhere, mAcc the mean over labeled
        classes, aAcc the share of labeled pixels that are correct.

        Raises:
            LightspineError: no labeled pixel was added.
        """
        return self._scores(self.confusion())

    def _scores(self, confusion: np.ndarray) -> dict[str, float]:
        if not confusion.any():
            raise LightspineError(f"no labeled pixel in {self.num_images} images")
        iou, accuracy = _iou_and_accuracy(confusion)
        return {
            "mIoU": float(np.nanmean(iou)),
            "mAcc": float(np.nanmean(accuracy)),
            "aAcc": 100 * float(np.trace(confusion) / confusion.sum()),
        }

    def majority_baseline(self) -> dict[str, Any]:
        """Return the scores in percent of always predicting the class with the most labeled pixels.

        `class` is its name; the others are those of `compute`.

        Raises:
            LightspineError: no labeled pixel was added.
        """
        confusion = self.confusion()
        largest = int(confusion.sum(axis=1).argmax())
        constant = np.zeros_like(confusion)
        constant[:, largest] = confusion.sum(axis=1)
        return {"class": self.class_names[largest]} | self._scores(constant)

    def per_class(self) -> list[dict[str, Any]]:
        """Return one row per class: index, name, percentages, labeled and predicted pixels.

        `IoU`, `accuracy` (recall), `precision` and `F1` (Dice) are None where the denominator is 0: IoU and
        F1 for a class that is neither labeled nor predicted, accuracy for one that is not labeled, precision
        for one that is not predicted.
        """
        confusion = self.confusion()
        iou, accuracy = _iou_and_accuracy(confusion)
        hits, true, found = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        return [
            {
                "class": number,
                "name": name,
                "IoU": None if np.isnan(iou[number]) else float(iou[number]),
                "accuracy": None if np.isnan(accuracy[number]) else float(accuracy[number]),
                "precision": 100 * float(hits[number] / found[number]) if found[number] else None,
                "F1": 200 * float(hits[number] / both) if (both := true[number] + found[number]) else None,
                "pixels": int(true[number]),
                "predicted": int(found[number]),
            }
            for number, name in enumerate(self.class_names)
        ]


def _iou_and_accuracy(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return IoU and accuracy of every class in percent, NaN for a zero denominator."""
    hits = np.diag(confusion).astype(np.float64)
    true, found = confusion.sum(axis=1), confusion.sum(axis=0)
    nothing = np.full_like(hits, np.nan)
    union = true + found - np.diag(confusion)
    iou = np.divide(100 * hits, union, out=nothing.copy(), where=union > 0)
    return iou, np.divide(100 * hits, true, out=nothing, where=true > 0)
