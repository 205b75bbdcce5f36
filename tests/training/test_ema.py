"""EMA: values of the average, validated weights and exported weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightspine import load_model
from lightspine.errors import UsageError
from support.training import make_task, run


class Recorder(pl.Callback):
    """Records the initial weights and those after every batch."""

    def __init__(self) -> None:
        self.initial: dict[str, Tensor] = {}
        self.steps: list[dict[str, Tensor]] = []

    def on_train_start(self, _: Any, task: Any) -> None:
        self.initial = trained_weights(task)

    def on_train_batch_end(self, _: Any, task: Any, *__: Any) -> None:
        self.steps.append(trained_weights(task))


def trained_weights(task: Any) -> dict[str, Tensor]:
    tensors = task.state_dict().items()
    return {name: tensor.clone() for name, tensor in tensors if tensor.is_floating_point()}


def average(initial: dict[str, Tensor], steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Return the closed form of timm's ModelEma, which starts with the initial weights."""
    mean = {name: value.double() for name, value in initial.items()}
    for step in steps:
        mean = {name: decay * value + (1 - decay) * step[name] for name, value in mean.items()}
    return mean


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_has_its_closed_form_after_every_step_of_the_optimizer(
    accumulate: int, tmp_path: Path
) -> None:
    recorder, task = Recorder(), make_task(ema_decay=0.8, lr=1e-2)
    result = run(tmp_path / "run", task=task, callbacks=[recorder], accumulate_grad_batches=accumulate)
    stored = torch.load(result.last_checkpoint, weights_only=True)["state_dict"]
    for name, value in average(recorder.initial, recorder.steps[accumulate - 1 :: accumulate], 0.8).items():
        torch.testing.assert_close(stored[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_average_and_self_distillation_have_the_precision_of_the_run(precision: str, tmp_path: Path) -> None:
    task = make_task(ema_decay=0.9, mesa={"start": 0.0})
    result = run(tmp_path / "run", task=task, epochs=1, precision=precision)
    stored = torch.load(result.last_checkpoint, weights_only=True)
    expected = {"64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]
    for entry in ("state_dict", "current_model_state"):
        assert {tensor.dtype for tensor in stored[entry].values() if tensor.is_floating_point()} == {expected}


def test_average_that_is_not_published_changes_nothing(tmp_path: Path) -> None:
    with_average = run(tmp_path / "a", task=make_task(ema_decay=0.999, export_weights="raw"))
    without = run(tmp_path / "b")
    scores = [
        [{k: v for k, v in row.items() if k.startswith(("train_", "val_"))} for row in r.history]
        for r in (with_average, without)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("publish", ["ema", "raw"])
def test_published_weights_are_the_model_and_the_others_beside_it(publish: str, tmp_path: Path) -> None:
    result = run(tmp_path / "run", task=make_task(ema_decay=0.9, export_weights=publish))
    assert result.weights == {"ema": result.ema_weights, "raw": result.raw_weights}[publish]
    other = "raw" if publish == "ema" else "ema"
    assert {path.name for path in result.folder.glob("*.safetensors")} == {
        "model.safetensors",
        f"model_{other}.safetensors",
    }
    stored = torch.load(result.last_checkpoint, weights_only=True)
    for path, entry in ((result.ema_weights, "state_dict"), (result.raw_weights, "current_model_state")):
        exported = load_model(path)[0].state_dict()
        assert all(torch.equal(stored[entry][f"model.{key}"], value) for key, value in exported.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, "between 0 and 1, got 1.0"),
        ({"ema_decay": 0.9, "export_weights": "best"}, "got 'best'"),
    ],
)
def test_wrong_average_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_task(**options)
