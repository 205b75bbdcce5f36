"""Segmentation metrics: mIoU, mAcc and aAcc from a confusion matrix."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspine.dense.all_gather import all_gather_by_image
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_write_text


class SegmentationMetrics:
    """Counts the pixels of every pair of true and predicted class.

    The counts are kept by image, without zeros: an image that is added again, or by two processes, counts
    once.

    Args:
        class_names: in the order of the labels.
        ignored: label of pixels that do not count.

    Raises:
        UsageError: there is no class.
    """

    def __init__(self, class_names: Sequence[str], *, ignored: int = 255) -> None:
        if not class_names:
            raise UsageError("expected at least one class, got none")
        self.class_names = list(class_names)
        self.ignored = ignored
        self._images: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def update(self, names: Iterable[str], predictions: Iterable[Tensor], labels: Iterable[Tensor]) -> None:
        """Count images.

        Args:
            names: what tells the images apart, such as their paths.
            predictions: chosen class of each pixel, each (H, W), whole numbers.
            labels: true class of each pixel, each (H, W), whole numbers.

        Raises:
            UsageError: a prediction of another size than its labels.
            LightspineError: a class that does not exist.
        """
        count = len(self.class_names)
        for name, prediction, truth in zip(names, predictions, labels, strict=True):
            if prediction.shape != truth.shape:
                raise UsageError(
                    f"expected a prediction of the labels' size {tuple(truth.shape)} for {name}, got "
                    f"{tuple(prediction.shape)}"
                )
            counted = truth != self.ignored
            found, true = prediction[counted].long(), truth[counted].long()
            for kind, classes in (("label", true), ("predicted class", found)):
                if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < count:
                    raise LightspineError(
                        f"expected every {kind} of {name} from 0 to {count - 1}, got "
                        f"{int(classes.min())} to {int(classes.max())}"
                    )
            pairs, pixels = torch.unique(true * count + found, return_counts=True)
            self._images[str(name)] = pairs.cpu().numpy(), pixels.cpu().numpy()

    def all_gather(self) -> None:
        """Take in the counts of all processes; every process has to call it."""
        self._images = all_gather_by_image(self._images)

    @property
    def num_images(self) -> int:
        """Number of images counted."""
        return len(self._images)

    def confusion(self) -> np.ndarray:
        """Return the pixels of every true class (row) taken for each class (column), int64."""
        count = len(self.class_names)
        total = np.zeros(count * count, dtype=np.int64)
        for pairs, pixels in self._images.values():
            total[pairs] += pixels
        return total.reshape(count, count)

    def compute(self) -> dict[str, float]:
        """Return `mIoU`, `mAcc` and `aAcc` in percent.

        mIoU is the mean over the classes that are labelled or predicted anywhere, mAcc the mean over those
        that are labelled; aAcc is the share of labelled pixels that are right.

        Raises:
            LightspineError: no labelled pixel was counted.
        """
        confusion = self.confusion()
        if not confusion.any():
            raise LightspineError(f"no labelled pixel to score in {self.num_images} images")
        iou, accuracy = _per_class(confusion)
        return {
            "mIoU": float(np.nanmean(iou)),
            "mAcc": float(np.nanmean(accuracy)),
            "aAcc": 100 * float(np.trace(confusion) / confusion.sum()),
        }

    def per_class(self) -> list[dict[str, Any]]:
        """Return a row per class: number, name, IoU and accuracy in percent, its pixels and those predicted.

        IoU is None for a class that is neither labelled nor predicted, accuracy for one that is not labelled.
        """
        confusion = self.confusion()
        iou, accuracy = _per_class(confusion)
        return [
            {
                "class": number,
                "name": name,
                "IoU": None if np.isnan(iou[number]) else float(iou[number]),
                "accuracy": None if np.isnan(accuracy[number]) else float(accuracy[number]),
                "pixels": int(confusion[number].sum()),
                "predicted": int(confusion[:, number].sum()),
            }
            for number, name in enumerate(self.class_names)
        ]

    def write_classes(self, path: str | Path) -> None:
        """Write the rows of `classes` as CSV.

        Raises:
            LightspineError: the file cannot be written.
        """
        rows = self.per_class()
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()}
            )
        atomic_write_text(Path(path), text.getvalue())


def _per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return IoU and accuracy of every class in percent, NaN where there is nothing to divide by."""
    hits = np.diag(confusion).astype(np.float64)
    true, found = confusion.sum(axis=1), confusion.sum(axis=0)
    nothing = np.full_like(hits, np.nan)
    union = true + found - np.diag(confusion)
    iou = np.divide(100 * hits, union, out=nothing.copy(), where=union > 0)
    return iou, np.divide(100 * hits, true, out=nothing, where=true > 0)
