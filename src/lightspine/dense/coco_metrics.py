"""COCO average precision and recall, computed by faster-coco-eval."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from lightspine.data.detection import CocoAnnotations, encode_mask
from lightspine.dense.all_gather import all_gather_by_image
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_write_text

Kind = Literal["box", "mask"]

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
"""The 12 numbers: precision over IoU 0.5 to 0.95, at 0.5, at 0.75, and of small (below 32 x 32 px), medium
and large (above 96 x 96 px) objects; recall with 1, 10 and all detections of an image, and of small, medium
and large objects.
"""

_IOU_TYPES: dict[Kind, str] = {"box": "bbox", "mask": "segm"}


class CocoMetrics:
    """Gathers detections and scores them against the objects of a COCO file.

    Detections are kept by image: one that is added again, or by two processes, counts once. Masks are packed
    as they come.

    Args:
        annotations: the objects; masks are scored where it was read with them.
        most_detections: the best of an image and class that count. COCO's is 100; more where images hold more
            objects.

    Raises:
        UsageError: less than 10 detections.
    """

    def __init__(self, annotations: CocoAnnotations, *, most_detections: int = 100) -> None:
        if most_detections < 10:
            raise UsageError(f"expected most_detections of at least 10, got {most_detections}")
        self.annotations = annotations
        self.most_detections = most_detections
        self.kinds: tuple[Kind, ...] = ("box",) if annotations.segmentations is None else ("box", "mask")
        self._known = set(annotations.image_ids.tolist())
        self._images: dict[int, list[dict[str, Any]]] = {}
        self._evaluations: dict[Kind, Any] = {}

    def update(self, image_ids: Iterable[int], predictions: Iterable[Mapping[str, Tensor]]) -> None:
        """Take in what a detector found.

        Args:
            image_ids: number of each image in the file.
            predictions: of each image, as torchvision's detectors give it: `boxes` (N, 4), left, top, right,
                bottom in pixels of the original image; `scores` (N,); `labels` (N,), class + 1; `masks`
                (N, 1, H, W) or (N, H, W), 0..1, counted from 0.5 on, where masks are scored.

        Raises:
            UsageError: an unknown image, a label that is no class, no masks where they are scored, masks of
                another size than the image.
            LightspineError: a box or score that is not finite.
        """
        for image_id, found in zip(image_ids, predictions, strict=True):
            if image_id not in self._known:
                raise UsageError(f"expected an image of the annotations, got the unknown image id {image_id}")
            self._images[int(image_id)] = self._convert(int(image_id), found)
        self._evaluations.clear()

    def all_gather(self) -> None:
        """Take in the detections of all processes; every process has to call it."""
        self._images = all_gather_by_image(self._images)
        self._evaluations.clear()

    @property
    def num_images(self) -> int:
        """Number of images that detections were added for."""
        return len(self._images)

    def results(self) -> list[dict[str, Any]]:
        """Return the detections as COCO's results format has them, by image."""
        return [found for image_id in sorted(self._images) for found in self._images[image_id]]

    def write_results(self, path: str | Path) -> None:
        """Write `results` as JSON.

        Raises:
            LightspineError: the file cannot be written.
        """
        atomic_write_text(Path(path), json.dumps(self.results()) + "\n")

    def compute(self) -> dict[Kind, dict[str, float | None]]:
        """Return the 12 numbers of `NUMBERS` in percent for boxes and, where they are scored, masks.

        Images without detections count. A number is None where there is nothing to average, such as no large
        object. The last six are named for `most_detections` of 100 and mean the given number otherwise.
        """
        return {
            kind: {
                name: _percent(value)
                for name, value in zip(NUMBERS, self._evaluate(kind).stats[: len(NUMBERS)], strict=True)
            }
            for kind in self.kinds
        }

    def per_class(self) -> dict[str, dict[str, float | None]]:
        """Return class name -> kind -> AP in percent; None for a class without objects."""
        per_class = {}
        for kind in self.kinds:
            # (thresholds, recalls, classes, object sizes, limits of detections); -1 where there is nothing.
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

    def _convert(self, image_id: int, found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
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
            masks = (self._masks(image_id, found) >= 0.5).cpu().numpy()
            for result, mask in zip(results, masks, strict=True):
                result["segmentation"] = encode_mask(mask)
        return results

    def _masks(self, image_id: int, found: Mapping[str, Tensor]) -> Tensor:
        if "masks" not in found:
            raise UsageError(f"the detections of image {image_id} have no masks, and masks are to be scored")
        position = int(np.flatnonzero(self.annotations.image_ids == image_id)[0])
        size = tuple(self.annotations.sizes[position].tolist())
        masks = found["masks"]
        masks = masks[:, 0] if masks.ndim == 4 else masks
        if tuple(masks.shape[1:]) != size:
            raise UsageError(
                f"expected masks of the size {size} for image {image_id}, got {tuple(masks.shape[1:])}"
            )
        return masks.detach()

    def _evaluate(self, kind: Kind) -> Any:
        if kind in self._evaluations:
            return self._evaluations[kind]
        content = self.annotations.to_coco()
        truth = COCO(content)
        # The scorer takes a detection with both for a box and would measure its area by it.
        dropped = "segmentation" if kind == "box" else "bbox"
        detections = [
            {key: value for key, value in result.items() if key != dropped} for result in self.results()
        ]
        found = truth.loadRes(detections) if detections else COCO(content | {"annotations": []})
        evaluation = COCOeval_faster(truth, found, iouType=_IOU_TYPES[kind])
        evaluation.params.maxDets = [1, 10, self.most_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        self._evaluations[kind] = evaluation
        return evaluation


def _percent(value: float) -> float | None:
    return None if math.isnan(value) or value < 0 else 100 * float(value)
