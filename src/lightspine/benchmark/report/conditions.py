"""Conditions, names and number formats of benchmark rows in charts and tables."""

import math
import re
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar, get_args

from lightspine.benchmark.results import Mode, Row
from lightspine.models import find_record

MODES = get_args(Mode)
TIMES = "\N{MULTIPLICATION SIGN}"

# Parts of timm's names that are omitted in charts: weights, patch size, window size, image size.
_TIMM_DETAILS = re.compile(r"\..*$|_patch\d+|_window\d+|_(192|224|240|256|288|384)(?=$|\.)")
_MAX_NAME_LENGTH = 30
_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")


class Conditions(NamedTuple):
    """Measurement conditions: times are comparable between rows with the same conditions."""

    device: str
    dtype: str
    threads: int
    batch: int

    def __str__(self) -> str:
        if self.device != "cpu":
            return f"{self.device}, {self.dtype}, batch {self.batch}"
        return f"CPU, {self.threads} thread{'s' * (self.threads != 1)}, {self.dtype}, batch {self.batch}"

    @property
    def short(self) -> str:
        """Batch size, and the dtype if it is not float32."""
        return f"batch {self.batch}" if self.dtype == "float32" else f"batch {self.batch}, {self.dtype}"


def conditions_of(row: Row) -> Conditions:
    """Return the conditions of a row."""
    return Conditions(row.device, row.dtype, row.threads, row.batch)


def format_size(row: Row) -> str:
    """Return the image size, such as `224x224` with a multiplication sign."""
    return f"{row.height}{TIMES}{row.width}"


def count_pixels(row: Row) -> int:
    """Return the number of pixels of an image."""
    return row.height * row.width


def short_name(row: Row) -> str:
    """Return a name of at most 30 characters for charts, without the details in timm's names."""
    name = row.model.removeprefix("timm/")
    if row.source == "timm":
        # timm has some models of lightspine under the same name.
        name = f"{name} (timm)" if find_record(name) else _TIMM_DETAILS.sub("", name)
    return truncate(f"{name} ({row.variant})" if row.variant else name, _MAX_NAME_LENGTH)


def family_of(row: Row) -> str | None:
    """Return the family of a model of lightspine, `None` for a model of timm."""
    if row.source != "lightspine":
        return None
    record = find_record(row.model)
    # The file may be of a newer version with other families.
    return record.family if record else truncate(row.model.partition("_")[0], _MAX_NAME_LENGTH // 2)


def format_status(row: Row) -> str:
    """Return the status in words, such as "out of memory"."""
    return row.status.replace("_", " ")


def group_by(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Group items by a key and keep their order."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def format_number(value: float, digits: int = 3) -> str:
    """Round to significant digits, without an exponent: 0.0123, 4.56, 1,235."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def format_published(value: float) -> str:
    """Write a number as published, without trailing zeros: 82.6, 467, 0.24."""
    return f"{value:,.10g}"


def truncate(text: str, length: int) -> str:
    """Shorten a text to a number of characters."""
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"
