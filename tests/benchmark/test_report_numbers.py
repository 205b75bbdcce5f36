"""Number formats of a benchmark report."""

import pytest

from lightspine.benchmark.report.conditions import format_number, format_published


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.012345, "0.0123"), (4.5, "4.50"), (123.4, "123"), (12345.6, "12,346"), (0, "0"), (-4.5, "-4.50")],
)
def test_number_has_three_digits_and_no_exponent(value: float, written: str) -> None:
    assert format_number(value) == written


@pytest.mark.parametrize(
    ("value", "written"), [(82.6, "82.6"), (467.0, "467"), (1686, "1,686"), (0.24, "0.24")]
)
def test_published_number_stays_as_it_is_printed(value: float, written: str) -> None:
    assert format_published(value) == written
