"""Outputs of batch inference: top classes or features, as columns with one row per image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.evaluation.classifiers import class_names
from lightspine.models.metadata import ModelMetadata

Table = dict[str, np.ndarray]
"""Column name -> one number, text or array per image."""

Compute = Callable[[Tensor], Table]
"""Images (N, 3, H, W) -> columns of N rows."""


@dataclass(frozen=True)
class TopClasses:
    """The most probable classes: columns `class_1` (index), `name_1`, `probability_1`, `class_2`, ...

    Attributes:
        topk: number of classes, limited to those of the model.
    """

    topk: int = 5

    def prepare(self, network: nn.Module, metadata: ModelMetadata) -> Compute:
        """Return the function that computes the columns.

        Raises:
            UsageError: topk below 1, or a checkpoint without a classifier.
        """
        if self.topk < 1:
            raise UsageError(f"expected topk of at least 1, got {self.topk}")
        count = int(getattr(network, "num_classes", 0))
        if count < 1:
            raise UsageError(f"expected a checkpoint with a classifier, got {metadata.name} without one")
        names = np.array(class_names(metadata, count), dtype=object)

        @torch.inference_mode()
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
    """Features before the classifier, float32.

    Attributes:
        stages: "pooled" (the vector before the classifier, in column `pooled`), a stage index from 0 (its
            feature map averaged over height and width, in column `stage0`), or "all".
        maps: keep the feature maps (channels, height, width) instead of averaging them.
    """

    stages: tuple[str, ...] = ("pooled",)
    maps: bool = False

    def prepare(self, network: nn.Module, metadata: ModelMetadata) -> Compute:
        """Return the function that computes the columns.

        Raises:
            UsageError: an exported file, an unknown stage, or maps without a stage.
        """
        model: Any = network
        if not hasattr(model, "forward_features"):
            raise UsageError(
                f"expected a checkpoint with the features of {metadata.name}, but an exported file has only "
                "its logits"
            )
        pooled, indices = self._select_stages(len(getattr(model, "feature_info", ())), metadata.name)
        if self.maps and not indices:
            raise UsageError("expected a stage together with maps: the pooled features have no map")

        @torch.inference_mode()
        def compute(images: Tensor) -> Table:
            table: dict[str, Tensor] = {}
            if indices:
                final, stages = model.forward_intermediates(images, indices=indices)
                for index, features in zip(indices, stages, strict=True):
                    table[f"stage{index}"] = features if self.maps else features.mean(dim=(2, 3))
            else:
                final = model.forward_features(images)
            if pooled:
                table["pooled"] = model.forward_head(final, pre_logits=True)
            return {name: features.float().cpu().numpy() for name, features in table.items()}

        return compute

    def _select_stages(self, count: int, name: str) -> tuple[bool, list[int]]:
        known: Sequence[str] = ("pooled", "all", *map(str, range(count)))
        if unknown := [stage for stage in self.stages if stage not in known]:
            raise UsageError(f"expected a stage of {name} out of {', '.join(known)}, got {unknown[0]!r}")
        select_all = "all" in self.stages
        indices = [index for index in range(count) if select_all or str(index) in self.stages]
        return select_all or "pooled" in self.stages, indices


def finite_rows(table: Table) -> np.ndarray:
    """Return a mask of the rows without NaN and infinity; (N,), bool."""
    rows: np.ndarray = np.ones(len(next(iter(table.values()))), dtype=bool)
    for column in table.values():
        if column.dtype.kind == "f":
            rows &= np.isfinite(column).reshape(len(column), -1).all(axis=1)
    return rows
