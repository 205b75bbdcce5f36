"""Which rows make a series over sizes, and what is fitted to it."""

from dataclasses import replace

import pytest

from lightspine.benchmark.report.numbers import TIMES
from lightspine.benchmark.report.sweeps import exponents, find_series
from lightspine.benchmark.results import Row
from support.bench_results import a_row, a_timing, sizes_result


def _rows(exponent: float, sides: tuple[int, ...] = (224, 448, 672)) -> list[Row]:
    return [
        a_row(
            "vim_tiny",
            height=side,
            width=side,
            forward=a_timing(1e-3 * (side * side) ** exponent),
            peak_memory_mib=float(side),
        )
        for side in sides
    ]


def test_exponents_are_over_the_pixel_count() -> None:
    found = {line.quantity: line.fit.exponent for line in exponents(find_series(_rows(1.25)))}
    # Memory grows with the side, which is the root of the pixels.
    assert found == pytest.approx({"forward pass": 1.25, "memory, forward": 0.5})


def test_two_sizes_make_no_series() -> None:
    assert find_series(_rows(1.0, sides=(224, 448))) == []


def test_size_without_memory_belongs_to_the_series_but_not_to_the_fit() -> None:
    (_, peer) = find_series(sizes_result().rows)
    assert [row.height for row in peer.out_of_memory] == [1344]
    assert {line.sizes for line in exponents([peer])} == {f"224{TIMES}224 to 1120{TIMES}1120, 5 sizes"}


def test_series_with_two_measured_sizes_has_no_exponent() -> None:
    rows = _rows(1.0)
    rows[-1] = replace(rows[-1], status="out_of_memory", forward=None, peak_memory_mib=None)
    assert exponents(find_series(rows)) == []


def test_modes_and_batches_are_series_of_their_own() -> None:
    rows = _rows(1.0)
    others = [replace(row, mode="onnx") for row in rows] + [replace(row, batch=8) for row in rows]
    assert len(find_series(rows + others)) == 3
