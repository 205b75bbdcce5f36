"""What became of every tensor of a checkpoint."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class LoadReport:
    """The outcome of loading a checkpoint into a model.

    Attributes:
        source: file name, or "the state dict".
        entry: entry of the file that was used, "" for a bare state dict.
        is_ema: all tensors are an exponential moving average.
        loaded: names in the model that received a tensor.
        converted: name in the model -> what was changed on the way (renamed, reshaped, resized, adapted).
        dropped: names in the file that the model has no place for, or a head of another size.
        dropped_head: a classifier of another size is among the dropped ones.
        missing: names in the model that kept their initial value.
        unexpected: names in the file that the model does not know (empty after a successful load).
        mismatched: name -> (shape in the file, shape in the model) (empty after a successful load).
    """

    source: str
    entry: str
    is_ema: bool
    loaded: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    dropped_head: bool = False
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every tensor that was not dropped found its place."""
        return not (self.unexpected or self.mismatched)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "source": self.source,
            "entry": self.entry,
            "is_ema": self.is_ema,
            "loaded": len(self.loaded),
            "converted": self.converted,
            "dropped": self.dropped,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": {name: [list(shape) for shape in pair] for name, pair in self.mismatched.items()},
        }

    def __str__(self) -> str:
        """One line for a log."""
        entry = f" from {self.entry!r}" if self.entry else ""
        parts = [
            f"loaded {len(self.loaded)} tensors{' (EMA)' if self.is_ema else ''}{entry} of {self.source}"
        ]
        for word, names in (
            ("converted", list(self.converted)),
            ("dropped", self.dropped),
            ("left at their initial value", self.missing),
        ):
            if names:
                parts.append(f"{len(names)} {word} ({_first(names)})")
        return ", ".join(parts)

    def mismatches(self, most: int = 3) -> str:
        """Return the first few reasons why the checkpoint does not fit."""
        reasons = [
            f"{name} is {_shape(found)} in the file and {_shape(expected)} in the model"
            for name, (found, expected) in self.mismatched.items()
        ]
        reasons += [f"{name} is missing in the file" for name in self.missing]
        reasons += [f"{name} is not in the model" for name in self.unexpected]
        more = f" and {len(reasons) - most} more" if len(reasons) > most else ""
        return "; ".join(reasons[:most]) + more


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "a scalar"
