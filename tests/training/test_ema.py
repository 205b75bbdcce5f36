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
    """Records the trained weights after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, _: Any, task: Any, *__: Any) -> None:
        trained = task.named_parameters()
        self.steps.append({name: parameter.detach().clone() for name, parameter in trained})


def average(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """Return the closed form of the EMA that starts with the weights after the first step."""
    mean = {name: value.clone().double() for name, value in steps[0].items()}
    for step in steps[1:]:
        mean = {name: decay * value + (1 - decay) * step[name] for name, value in mean.items()}
    return mean


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_has_its_closed_form_after_every_step_of_the_optimizer(
    accumulate: int, tmp_path: Path
) -> None:
    recorder, task = Recorder(), make_task(ema_decay=0.8, lr=1e-2)
    result = run(tmp_path / "run", task=task, callbacks=[recorder], accumulate_grad_batches=accumulate)
    stored = torch.load(result.last_checkpoint, weights_only=True)["state_dict"]
    for name, value in average(recorder.steps[accumulate - 1 :: accumulate], 0.8).items():
        torch.testing.assert_close(stored[name].double(), value, rtol=1e-5, atol=1e-6)


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
