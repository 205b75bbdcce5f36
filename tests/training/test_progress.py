"""Lines and tables that a run prints where there is no terminal."""

import re
from pathlib import Path

import pytest

from lightspine.training.progress import EpochTable, LineProgress
from support.training import run

METRICS = ("train_loss", "val_loss", "val_top1", "lr")
ROW = {
    "epoch": 0.0,
    "seconds": 83.2,
    "train_loss": 2.31214,
    "val_loss": 2.1,
    "val_top1": 5.984e-05,
    "lr": 1e-3,
    "data_share": 0.05,
    "peak_mib": 900.0,
}


def test_row_has_percentages_with_two_decimals_below_a_header() -> None:
    header, line = EpochTable(METRICS).lines(ROW, 30)
    names = ["epoch", "train_loss", "val_loss", "val_top1 %", "lr", "time", "data wait"]
    assert re.split(r"  +", header) == names
    assert line.split() == ["1/30", "2.3121", "2.1000", "0.00", "1.00e-03", "1:23", "5", "%"]
    assert len(header) == len(line)


def test_header_is_printed_again_only_for_new_columns() -> None:
    table = EpochTable(METRICS)
    without = {name: value for name, value in ROW.items() if not name.startswith("val_")}
    lengths = [len(table.lines(row, 30)) for row in (without, without, ROW, without, ROW)]
    assert lengths == [2, 1, 2, 1, 1]


def test_epoch_without_validation_has_dashes_below_the_scores() -> None:
    table = EpochTable(METRICS)
    header, _ = table.lines(ROW, 30)
    [line] = table.lines({name: ROW[name] for name in ROW if not name.startswith("val_")}, 30)
    assert line.split() == ["1/30", "2.3121", "-", "-", "1.00e-03", "1:23", "5", "%"]
    assert len(header) == len(line)


def test_lines_tell_the_position_the_loss_and_the_remaining_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "run", epochs=1, callbacks=[LineProgress(every_seconds=0)])
    lines = capsys.readouterr().err.splitlines()
    steps = [
        re.match(r"epoch 1/1: batch (\d)/6, loss ([\d.]+), [\d.]+ batches/s, \d:\d\d left", x) for x in lines
    ]
    losses = [float(step[2]) for step in steps if step]
    assert [step[1] for step in steps if step] == list("123456")
    assert sum(losses) / 6 == pytest.approx(result.history[0]["train_loss"], rel=1e-3)
    assert lines[-1] == "epoch 1/1: validation, batch 2/2"


def test_loss_of_accumulated_batches_is_that_of_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", epochs=1, callbacks=[LineProgress(every_seconds=0)], accumulate_grad_batches=2)
    losses = [float(found[1]) for found in re.finditer(r"loss ([\d.]+)", capsys.readouterr().err)]
    assert all(loss > 1.5 for loss in losses)  # log(10) = 2.3 before training


def test_nothing_is_printed_before_the_time_has_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", epochs=1, callbacks=[LineProgress(every_seconds=3600)])
    assert capsys.readouterr().err == ""
