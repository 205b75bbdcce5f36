"""Benchmark result file: round trip, and errors for damaged files."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.benchmark.results import (
    BenchResult,
    PublishedFigures,
    Row,
    load_results,
    save_results,
)
from lightspine.errors import LightspineError

ROW = Row(
    model="shvit_s1",
    source="lightspine",
    mode="eager",
    device="cpu",
    dtype="float32",
    threads=1,
    batch=8,
    height=224,
    width=192,
    status="ok",
    forward=Timing(median_ms=10.5, p90_ms=12.0, repeats=3, images_per_s=761.9),
    peak_memory_mib=30.25,
    parameters=6_330_808,
    macs=241_320_768,
    macs_scan=0,
    published=PublishedFigures(top1=72.8, source="a README"),
)
FAILED = replace(ROW, model="other", status="failed", error="it broke", forward=None, published=None)


def _result(*rows: Row) -> BenchResult:
    return BenchResult(
        command=["lightspine", "bench", "shvit_s1"],
        preset=None,
        settings={"repeats": 3, "sizes": [None, [224, 192]]},
        system={"processor": "a processor"},
        matmul_gflops={"float32": 90.5},
        rows=list(rows),
    )


def test_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = _result(ROW, FAILED)
    save_results(written, tmp_path)
    assert load_results(tmp_path) == written
    assert load_results(tmp_path / "results.json") == written


def test_table_has_a_line_per_row(tmp_path: Path) -> None:
    save_results(_result(FAILED, ROW), tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["other", "shvit_s1"]
    assert [line["forward_median_ms"] for line in lines] == ["", "10.5"]
    assert [line["published_top1"] for line in lines] == ["", "72.8"]
    assert lines[0]["error"] == "it broke"


def test_rows_of_other_sizes_and_variants_have_other_keys() -> None:
    others = [replace(ROW, width=224), replace(ROW, variant="a"), replace(ROW, source="timm")]
    assert len({row.key for row in (ROW, *others)}) == 4
    assert replace(ROW, forward=None, status="failed").key == ROW.key


def _change(path: tuple[Any, ...], value: object, folder: Path) -> Path:
    """Write a result with one changed field."""
    content = json.loads(json.dumps(_result(ROW).as_dict()))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("format",), 2, "expected a result of format 1, .* has 2"),
        (("rows",), {}, "rows must be of type list, got {}"),
        (("rows", 0, "batch"), "8", r"rows\[0\]\.batch must be of type int, got '8'"),
        (("rows", 0, "batch"), True, r"rows\[0\]\.batch must be of type int, got True"),
        (
            ("rows", 0, "status"),
            "fine",
            r"rows\[0\]\.status must be one of ok, out_of_memory, failed, absent",
        ),
        (("rows", 0, "forward", "p90_ms"), None, r"rows\[0\]\.forward\.p90_ms must be of type number"),
        (("rows", 0, "colour"), "red", r"rows\[0\]\.colour is not known"),
        (("rows", 0), 3, r"rows\[0\] must be an object"),
        (("matmul_gflops", "float32"), "fast", r"matmul_gflops\.float32 must be of type number"),
    ],
)
def test_damaged_field_is_named(path: tuple[Any, ...], value: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match=sentence):
        load_results(_change(path, value, tmp_path))


def test_missing_field_is_named(tmp_path: Path) -> None:
    content = _result(ROW).as_dict()
    del content["rows"][0]["mode"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(LightspineError, match=r"rows\[0\]\.mode is missing"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "is not JSON"), ("[]", "has no field `format`"), ('{"rows": []}', "has no field `format`")],
)
def test_another_file_is_no_result(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(LightspineError, match=sentence):
        load_results(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match=r"cannot read .*results\.json: No such file"):
        load_results(tmp_path)
