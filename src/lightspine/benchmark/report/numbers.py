"""How numbers and names are written for people."""

import math

TIMES = "\N{MULTIPLICATION SIGN}"


def number(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, whole numbers in full: 0.0123, 4.56, 1,235."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def plain(value: float) -> str:
    """Return a number as a file or a paper gives it, without zeros at its end: 82.6, 467, 0.24."""
    return f"{value:,.10g}"


def cut(name: str, letters: int) -> str:
    """Return a name with at most so many letters: a chart must keep room for itself."""
    return name if len(name) <= letters else f"{name[: letters - 1]}\N{HORIZONTAL ELLIPSIS}"
