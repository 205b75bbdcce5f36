"""Classification metrics: top-1, top-5, loss, per-class counts and the confusion matrix."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import LightspineError

LARGEST_CONFUSION = 2000
"""With more classes the matrix of all pairs is not kept: it would take gigabytes."""

LARGEST_REPORTED = 200
"""With more classes the matrix would make the most of a report; `classes.csv` has what matters of it."""


class ClassificationMetrics:
    """Counts what a classifier gets right.

    Args:
        num_classes: of the classifier.
        right_classes: the classes that count as right for each label, where there are several; such images
            have no place in the counts per class, in the confusion matrix and in the loss.
        candidates: the classes that may be chosen; the scores of the others are passed over.
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
        chosen_from = range(num_classes) if candidates is None else candidates
        self.num_candidates = len(chosen_from)
        self.ranks = min(5, self.num_candidates)
        self.closed = torch.ones(num_classes, dtype=torch.bool)
        self.closed[list(chosen_from)] = False
        self.num_images = self.hits = self.near_hits = 0
        self.loss = 0.0
        self.class_counts = torch.zeros(4, num_classes, dtype=torch.int64)
        keep = right_classes is None and num_classes <= LARGEST_CONFUSION
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64) if keep else None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            logits: (N, classes), float32, on the CPU.
            labels: (N,), int64.

        Raises:
            LightspineError: a logit is not finite.
        """
        if not torch.isfinite(logits).all():
            broken = int((~torch.isfinite(logits)).any(dim=1).sum())
            raise LightspineError(
                f"the model gives values that are not finite for {broken} images of a batch"
            )
        logits = logits.masked_fill(self.closed, -torch.inf)
        ranked = logits.topk(self.ranks).indices
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
        hit, near = right[:, 0], right.any(dim=1)
        self.num_images += len(labels)
        self.hits += int(hit.sum())
        self.near_hits += int(near.sum())
        if self.right_classes is None:
            self._count_classes(labels, ranked[:, 0], hit, near)

    def _count_classes(self, labels: Tensor, chosen: Tensor, hit: Tensor, near: Tensor) -> None:
        size = self.num_classes
        for row, members in enumerate((labels, labels[hit], labels[near], chosen)):
            self.class_counts[row] += torch.bincount(members, minlength=size)
        if self.confusion is not None:
            self.confusion += torch.bincount(labels * size + chosen, minlength=size**2).view(size, size)

    def compute(self) -> dict[str, float | None]:
        """Return `top1` and `top5` in percent and the mean `loss`.

        `top5` is None where there are five classes or fewer to choose among, `loss` where images have several
        right classes.
        """
        return {
            "top1": 100 * self.hits / self.num_images,
            "top5": 100 * self.near_hits / self.num_images if self.num_candidates > 5 else None,
            "loss": self.loss / self.num_images if self.right_classes is None else None,
        }

    def per_class(self, names: Sequence[str]) -> dict[str, dict[str, Any]] | None:
        """Return the counts of every class, or None where images have several right classes.

        `images`; `top1` and `top5` in percent; `predicted`: images of any class that were taken for it;
        `confused_with` and `confused_images`: the class it is most often taken for when it is missed.
        """
        if self.right_classes is not None:
            return None
        counts = self.class_counts.T.tolist()
        return {
            name: {
                "images": images,
                "top1": _percent(hits, images),
                "top5": _percent(near, images) if self.num_candidates > 5 else None,
                "predicted": predicted,
            }
            | self._confused(number, names)
            for number, (name, (images, hits, near, predicted)) in enumerate(zip(names, counts, strict=True))
        }

    def _confused(self, number: int, names: Sequence[str]) -> dict[str, Any]:
        if self.confusion is None:
            return {}
        missed = self.confusion[number].clone()
        missed[number] = 0
        most = int(missed.max())
        return {"confused_with": names[int(missed.argmax())] if most else None, "confused_images": most}


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
