"""Numbers of COCO files, which other programs also write as text, floats or booleans."""

import math
from typing import Any

from lightspine.errors import LightspineError

_FLAGS = {"0": False, "false": False, "1": True, "true": True}


def to_int(value: Any) -> int | None:
    """Return a whole number of 64 bits, also one written as a float or as text; `None` for other values."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = to_float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def to_float(value: Any) -> float | None:
    """Return a finite number, also one written as text; `None` for other values."""
    if type(value) not in (int, float, str):
        return None
    try:
        number = float(value)
    # A text that is not a number, or a whole number of hundreds of digits.
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def to_box(value: Any) -> list[float]:
    """Return a box: left, top, width, height.

    Raises:
        LightspineError: it is not a list of four finite numbers.
    """
    numbers = [to_float(side) for side in value] if isinstance(value, list) else []
    if len(numbers) != 4 or None in numbers:
        raise LightspineError("box that is not four finite numbers")
    return [number for number in numbers if number is not None]


def to_flag(value: Any) -> bool:
    """Return COCO's iscrowd: 0, 1, true or false, also as text; `None` is false.

    Raises:
        LightspineError: another value.
    """
    if value is None:
        return False
    text = str(to_int(value)) if to_int(value) is not None else str(value).strip().lower()
    if text not in _FLAGS:
        raise LightspineError("iscrowd that is neither 0 nor 1")
    return _FLAGS[text]
