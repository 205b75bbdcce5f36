"""Classification metrics: top-1, top-5, loss, recall, precision, F1 and the confusion matrix.

torchmetrics takes seconds to import and does not support several correct classes per image.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import LightspineError

MAX_CONFUSION_CLASSES = 2000
"""Largest number of classes with a confusion matrix; larger ones would take gigabytes."""

_MACRO = ("macro_recall", "macro_precision", "macro_f1", "majority_baseline")


class ClassificationMetrics:
    """Top-1, top-5, loss, per-class counts and confusion matrix, accumulated over batches.

    Args:
        num_classes: number of classes of the classifier.
        right_classes: correct classes of each label, if an image may have several; there are then no
            per-class counts, confusion matrix or loss.
        candidates: classes that may be predicted; the logits of all others are ignored.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        right_classes: Sequence[tuple[int, ...]] | None = None,
        candidates: Sequence[int] | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.right_classes = right_classes
        candidate_classes = range(num_classes) if candidates is None else candidates
        self.num_candidates = len(candidate_classes)
        self.excluded = torch.ones(num_classes, dtype=torch.bool)
        self.excluded[list(candidate_classes)] = False
        self.num_images = self.top1_hits = self.top5_hits = 0
        self.loss = 0.0
        # Rows: images, top-1 hits, top-5 hits and predictions of each class.
        self.class_counts = torch.zeros(4, num_classes, dtype=torch.int64)
        keep_confusion = right_classes is None and num_classes <= MAX_CONFUSION_CLASSES
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64) if keep_confusion else None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (N, classes), float32, on the CPU.
            labels: (N,), int64.

        Raises:
            LightspineError: a logit is not finite.
        """
        if not torch.isfinite(logits).all():
            count = int((~torch.isfinite(logits)).any(dim=1).sum())
            raise LightspineError(f"the model gives values that are not finite for {count} images of a batch")
        logits = logits.masked_fill(self.excluded, -torch.inf)
        ranked = logits.topk(min(5, self.num_candidates)).indices
        if self.right_classes is None:
            right = ranked == labels[:, None]
            self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        else:
            allowed = [self.right_classes[label] for label in labels.tolist()]
            right = torch.tensor(
                [
                    [number in classes for number in row]
                    for row, classes in zip(ranked.tolist(), allowed, strict=True)
                ]
            )
        top1, top5 = right[:, 0], right.any(dim=1)
        self.num_images += len(labels)
        self.top1_hits += int(top1.sum())
        self.top5_hits += int(top5.sum())
        if self.right_classes is None:
            self._update_classes(labels, ranked[:, 0], top1, top5)

    def _update_classes(self, labels: Tensor, predicted: Tensor, top1: Tensor, top5: Tensor) -> None:
        size = self.num_classes
        for row, members in enumerate((labels, labels[top1], labels[top5], predicted)):
            self.class_counts[row] += torch.bincount(members, minlength=size)
        if self.confusion is not None:
            self.confusion += torch.bincount(labels * size + predicted, minlength=size**2).view(size, size)

    def compute(self) -> dict[str, float | None]:
        """Return `top1`, `top5`, the macro averages and the baseline in percent, and the mean `loss`.

        `macro_recall` (balanced accuracy), `macro_precision` and `macro_f1` are means over the classes that
        have images or are predicted; an undefined value counts as 0, as in scikit-learn.
        `majority_baseline` is the top-1 accuracy of always predicting the most frequent class. `top5` is None
        with five candidate classes or fewer, the others if images have several correct classes.
        """
        single = self.right_classes is None
        return {
            "top1": 100 * self.top1_hits / self.num_images,
            "top5": 100 * self.top5_hits / self.num_images if self.num_candidates > 5 else None,
            "loss": self.loss / self.num_images if single else None,
        } | (self._macro_averages() if single else dict.fromkeys(_MACRO))

    def _macro_averages(self) -> dict[str, float | None]:
        images, hits, _, predicted = self.class_counts.double()
        present = (images + predicted) > 0
        images, hits, predicted = images[present], hits[present], predicted[present]
        values = (
            # A class without images has no hit, so that the denominator does not matter.
            (hits / images.clamp(min=1)).mean(),
            (hits / predicted.clamp(min=1)).mean(),
            (2 * hits / (images + predicted)).mean(),
            images.max() / self.num_images,
        )
        return {name: 100 * float(value) for name, value in zip(_MACRO, values, strict=True)}

    def per_class(self, names: Sequence[str]) -> dict[str, dict[str, Any]] | None:
        """Return the metrics of every class, or None if images have several correct classes.

        `images`; `top1` (recall) and `top5` in percent; `precision` and `f1` in percent, None if undefined;
        `predicted`: number of images predicted as the class;
        `confused_with` and `confused_images`: its most frequent wrong prediction.
        """
        if self.right_classes is not None:
            return None
        counts = self.class_counts.T.tolist()
        return {
            name: {
                "images": images,
                "top1": _percent(top1, images),
                "top5": _percent(top5, images) if self.num_candidates > 5 else None,
                "precision": _percent(top1, predicted),
                "f1": _percent(2 * top1, images + predicted),
                "predicted": predicted,
            }
            | self._most_confused(index, names)
            for index, (name, (images, top1, top5, predicted)) in enumerate(zip(names, counts, strict=True))
        }

    def _most_confused(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        if self.confusion is None:
            return {}
        errors = self.confusion[index].clone()
        errors[index] = 0
        largest = int(errors.max())
        return {
            "confused_with": names[int(errors.argmax())] if largest else None,
            "confused_images": largest,
        }


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
