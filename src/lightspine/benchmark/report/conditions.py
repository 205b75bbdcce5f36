"""The rows of a result file as a report needs them: what was measured alike, and short names."""

import re
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

from lightspine.benchmark.report.numbers import TIMES, cut
from lightspine.benchmark.results import Row
from lightspine.models import find_record

MODES = ("eager", "optimized", "compile", "onnx")
"""From the plainest to the most prepared."""

# What timm's names say about the weights, a patch, a window or the input size, which the tables tell.
_DETAILS = re.compile(r"\..*$|_patch\d+|_window\d+|_(192|224|240|256|288|384)(?=$|\.)")
_MOST_LETTERS = 30
_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")


class Conditions(NamedTuple):
    """What two rows must share for their times to be compared."""

    device: str
    dtype: str
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.machine}, {self.images}"

    @property
    def images(self) -> str:
        """The batch in words."""
        return "one image" if self.batch == 1 else f"{self.batch} images"

    @property
    def headline(self) -> str:
        """The batch and, where it is not the usual one, the type in words."""
        return self.images if self.dtype == "float32" else f"{self.images}, {self.dtype}"

    @property
    def machine(self) -> str:
        """Device, type and threads in words."""
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.device == "cpu" else ""
        return f"{self.device.upper() if self.device == 'cpu' else self.device}{threads}, {self.dtype}"


def conditions_of(row: Row) -> Conditions:
    """Return under what a row was measured."""
    return Conditions(row.device, row.dtype, row.threads, row.batch)


def size_of(row: Row) -> str:
    """Return the input's size as `224x224`, with the sign of multiplication."""
    return f"{row.height}{TIMES}{row.width}"


def pixels_of(row: Row) -> int:
    """Return the input's height times width."""
    return row.height * row.width


def name_of(row: Row) -> str:
    """Return a name for a chart, 30 letters at most; timm's lose what says patch, window or input size."""
    name = row.model.removeprefix("timm/")
    if row.source == "timm":
        # Some of ours are in timm too, under the same name.
        name = f"{name} (timm)" if find_record(name) else _DETAILS.sub("", name)
    return cut(f"{name} ({row.variant})" if row.variant else name, _MOST_LETTERS)


def is_ours(row: Row) -> bool:
    """Whether the row measured a model of this library, not a peer."""
    return row.source == "lightspine"


def family_of(model: str) -> str:
    """Return the family of one of our models; where this version lacks it, what its name begins with."""
    record = find_record(model)
    return record.family if record else cut(model.partition("_")[0], _MOST_LETTERS // 2)


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Return the items by a key, both in the order of the items."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def mode_order(mode: str) -> int:
    """Return where a mode stands among the modes."""
    return MODES.index(mode)


def status_in_words(row: Row) -> str:
    """Return why a row has no time, such as "out of memory"."""
    return row.status.replace("_", " ")
