"""Outputs computed per image: top classes or features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.evaluation.classifiers import class_names
from lightspine.models.checkpoint import ModelMetadata

Table = dict[str, np.ndarray]
"""Column name -> one value, text or array per image."""

Compute = Callable[[Tensor], Table]


@dataclass(frozen=True)
class TopClasses:
    """The likeliest classes: columns `class_1` (number), `name_1`, `probability_1`, `class_2`, ...

    Attributes:
        topk: how many; at most all.
    """

    topk: int = 5

    def prepare(self, network: nn.Module, saved: ModelMetadata) -> Compute:
        """Return the function from images (N, 3, H, W) to the columns.

        Raises:
            UsageError: fewer than one class was asked for, or the checkpoint has no classifier.
        """
        if self.topk < 1:
            raise UsageError(f"expected topk of at least 1, got {self.topk}")
        count = int(getattr(network, "num_classes", 0))
        if count < 1:
            raise UsageError(f"expected a checkpoint with a classifier, but that of {saved.name} has none")
        names = np.array(class_names(saved, count), dtype=object)

        def compute(images: Tensor) -> Table:
            top = network(images).float().softmax(dim=-1).topk(min(self.topk, count))
            values, classes = top.values.cpu().numpy(), top.indices.cpu().numpy()
            table: Table = {}
            for rank in range(classes.shape[1]):
                table[f"class_{rank + 1}"] = classes[:, rank]
                table[f"name_{rank + 1}"] = names[classes[:, rank]]
                table[f"probability_{rank + 1}"] = values[:, rank]
            return table

        return compute


@dataclass(frozen=True)
class Features:
    """What a network makes of an image before it is classified, float32.

    Attributes:
        stages: "pooled" (column `pooled`: the vector that the classifier takes), the number of a stage from
            0 (column `stage0`: its map, averaged over the image), or "all" for every stage and the vector.
        maps: keep the stages' maps (channels, height, width) instead of their average.
    """

    stages: tuple[str, ...] = ("pooled",)
    maps: bool = False

    def prepare(self, network: nn.Module, saved: ModelMetadata) -> Compute:
        """Return the function from images (N, 3, H, W) to the columns.

        Raises:
            UsageError: an unknown stage, or maps of the vector alone.
        """
        model: Any = network
        pooled, numbers = self._choose(len(getattr(model, "feature_info", ())), saved.name)
        if self.maps and not numbers:
            raise UsageError("expected a stage beside maps: the pooled features have no map")

        def compute(images: Tensor) -> Table:
            table: dict[str, Tensor] = {}
            if numbers:
                final, stages = model.forward_intermediates(images, indices=numbers)
                for number, features in zip(numbers, stages, strict=True):
                    table[f"stage{number}"] = features if self.maps else features.mean(dim=(2, 3))
            else:
                final = model.forward_features(images)
            if pooled:
                table["pooled"] = model.forward_head(final, pre_logits=True)
            return {name: features.float().cpu().numpy() for name, features in table.items()}

        return compute

    def _choose(self, count: int, name: str) -> tuple[bool, list[int]]:
        known: Sequence[str] = ("pooled", "all", *map(str, range(count)))
        if unknown := [stage for stage in self.stages if stage not in known]:
            raise UsageError(f"expected a stage of {name} out of {', '.join(known)}, got {unknown[0]!r}")
        everything = "all" in self.stages
        numbers = [number for number in range(count) if everything or str(number) in self.stages]
        return everything or "pooled" in self.stages, numbers


def finite_rows(table: Table) -> np.ndarray:
    """Return which images have finite numbers only; (N,), bool."""
    rows: np.ndarray = np.ones(len(next(iter(table.values()))), dtype=bool)
    for column in table.values():
        if column.dtype.kind == "f":
            rows &= np.isfinite(column).reshape(len(column), -1).all(axis=1)
    return rows


def no_grad(compute: Compute) -> Compute:
    """Return the function without the record that gradients need."""
    return torch.inference_mode()(compute)
