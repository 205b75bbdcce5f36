"""`lightspine bench export`: what it measures and how it judges. No time is asserted."""

import json
from pathlib import Path

import pytest

from lightspine.benchmark.export_speed import ExportReport, ExportRow, measure_export
from lightspine.benchmark.turns import Timing
from lightspine.errors import UsageError
from lightspine_cli._bench_export_output import print_export
from lightspine_cli.main import main


def _row(model: str, batch: int, **ms: float) -> ExportRow:
    times = {what.replace("_", " "): Timing(median_ms=value, calls=3) for what, value in ms.items()}
    return ExportRow(model=model, batch=batch, times=times, bytes=102, weight_bytes=100)


def _report(*rows: ExportRow) -> ExportReport:
    system = {"processor": "p", "date": "d", "versions": {"torch": "2", "onnxruntime": "1"}}
    return ExportReport(system=system, threads=2, size=(224, 224), rows=list(rows))


def test_small_model_is_to_be_half_as_fast_again() -> None:
    report = _report(_row("shvit_s1", 1, eager=14.0, onnx=10.0, timm_onnx=11.0))
    assert [(check.what, check.met) for check in report.checks] == [
        ("file / weights", True),
        ("eager / onnx", False),
        ("timm onnx / onnx", True),
    ]


def test_scanning_model_is_to_be_no_slower() -> None:
    report = _report(
        _row("vmamba_tiny", 8, eager=14.0, onnx=13.0), _row("vim_tiny", 1, eager=14.0, onnx=15.0)
    )
    assert [check.met for check in report.checks if check.what == "eager / onnx"] == [True, False]


def test_table_says_of_each_target_whether_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    print_export(_report(_row("vim_tiny", 1, eager=14.0, optimized=13.0, onnx=28.0)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "vim_tiny, batch 1 file / weights 1.020 <= 1.03 met" in lines
    assert "vim_tiny, batch 1 eager / onnx 0.500 >= 1 missed" in lines
    assert "1 of 2 targets met" in lines


@pytest.mark.slow
def test_all_four_are_measured() -> None:
    report = measure_export(["shvit_s1"], [1], threads=1, repeats=1, size=(64, 64))
    assert set(report.rows[0].times) == {"eager", "optimized", "onnx", "timm onnx"}
    assert report.as_dict()["checks"][0]["what"] == "file / weights"


@pytest.mark.slow
def test_command_writes_all_numbers_and_verdicts(tmp_path: Path) -> None:
    arguments = ["--models", "shvit_s1", "--batch", "1", "--threads", "1", "--repeats", "1"]
    assert main(["bench", "export", *arguments, "--out", str(tmp_path / "out" / "speed.json")]) == 0
    written = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["model"] for row in written["rows"]] == ["shvit_s1"]
    assert {check["what"] for check in written["checks"]} >= {"file / weights", "eager / onnx"}


def test_file_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "export", "--out", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"expected a file to write, got the folder {tmp_path}" in line


def test_unknown_model_is_refused() -> None:
    with pytest.raises(UsageError, match="the closest names are shvit_s1"):
        measure_export(["shvit_s11"])


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="expected models, batches"):
        measure_export(["shvit_s1"], [0])
