"""Tell from the tensors alone of which family and variant a checkpoint is."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.models._registry import ModelRecord, get_record, list_models


@dataclass(frozen=True)
class Identification:
    """The registered model that fits a set of tensors best.

    Attributes:
        name: registered name.
        family: its family.
        fitting: number of tensors that fit by name and shape.
        expected: number of tensors that the model has.
        received: number of tensors in the checkpoint, after its key map.
    """

    name: str
    family: str
    fitting: int
    expected: int
    received: int

    @property
    def exact(self) -> bool:
        """Every tensor fits and none is left over."""
        return self.fitting == self.expected == self.received

    def __str__(self) -> str:
        """The name, with how much of it fits where not all does."""
        most = max(self.expected, self.received)
        return self.name if self.exact else f"{self.name} ({self.fitting} of {most} tensors fit)"


@cache
def _build_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return get_record(name).create()


def identify_tensors(state_dict: dict[str, Tensor]) -> Identification | None:
    """Return the registered model whose tensors fit best, or `None` when fewer than half of any model's do.

    Args:
        state_dict: tensors of one entry of a file, in the published layout, timm's or ours.
    """
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in state_dict.items()}
    best: tuple[float, int, Identification] | None = None
    for name in list_models():
        found = _compare(get_record(name), shapes)
        score = found.fitting / max(found.expected, found.received)
        # Variants may differ only in what a key map resizes or leaves out: the size then decides.
        distance = -abs(_numel(shapes) - _numel(_build_on_meta(name).state_dict()))
        if best is None or (score, distance) > best[:2]:
            best = (score, distance, found)
    return best[2] if best is not None and best[0] > 0.5 else None


def _compare(record: ModelRecord, shapes: dict[str, Tensor]) -> Identification:
    model = _build_on_meta(record.name)
    expected = model.state_dict()
    fitted = record.checkpoint_filter_fn(dict(shapes), model)
    fitting = sum(key in expected and tensor.shape == expected[key].shape for key, tensor in fitted.items())
    return Identification(record.name, record.family, fitting, len(expected), len(fitted))


def _numel(state_dict: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state_dict.values())
