"""Gradient accumulation to an effective batch size."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.data.modules import DigitsDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.training.callbacks import GradientAccumulation, RunLog
from lightspine.training.classification import ClassificationTask
from lightspine.training.fit import TrainResult, train
from support.training import read_weights


def _run(folder: Path, *, batch_size: int, batches: int, **options: Any) -> TrainResult:
    # Layer norms only, so that an image does not depend on its batch; plain steps along the gradient.
    task = ClassificationTask("test_vit", 10, model_args={"img_size": 32}, optimizer="sgd", lr=0.05)
    data = DigitsDataModule(batch_size=batch_size, augment=False)
    limits = {"limit_train_batches": batches, "limit_val_batches": 2, "accelerator": "cpu"}
    return train(task, data, folder=folder, epochs=2, progress=False, **limits, **options)


def test_effective_batch_trains_like_the_whole_batch(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", batch_size=32, batches=4)
    parts = _run(tmp_path / "parts", batch_size=8, batches=16, effective_batch=32)
    expected, actual = (read_weights(result.last_checkpoint) for result in (whole, parts))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert [row["lr"] for row in parts.history] == [row["lr"] for row in whole.history]


def test_effective_batch_cuts_an_epoch_to_whole_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result = _run(tmp_path / "run", batch_size=8, batches=11, effective_batch=32)
    stated = "effective batch 32 = 1 device x 8 images x 4 accumulated batches; 2 steps per epoch"
    assert stated in caplog.messages
    assert torch.load(result.last_checkpoint, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (30, {}, "a multiple of 1 device x 8 images = 8, got 30"),
        (32, {"accumulate_grad_batches": 2}, r"either effective_batch or accumulate.*got both \(32 and 2\)"),
        (800, {}, "at least 800 images for one step with the effective batch, got 32"),
    ],
)
def test_wrong_effective_batch_is_refused_before_the_first_step(
    tmp_path: Path, size: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _run(tmp_path / "run", batch_size=8, batches=4, effective_batch=size, **options)


def test_effective_batch_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        GradientAccumulation(0)


@pytest.mark.parametrize(
    "rows",
    [[{"epoch": 0.0, "=cmd|' /C calc'!A0": 1.0}], [{"epoch": "\x1b[2J"}], [{"loss": 1.0}], [7]],
    ids=str,
)
def test_metrics_of_a_foreign_checkpoint_are_names_and_numbers(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(LightspineError, match="metrics of the epochs"):
        RunLog(tmp_path).load_state_dict({"rows": rows})
