"""The same training on fewer devices or with less memory."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightspine.data.modules import DigitsDataModule
from lightspine.errors import UsageError
from lightspine.models.factory import create_model
from lightspine.training.callbacks import GradientAccumulation
from lightspine.training.classification import ClassificationTask
from lightspine.training.fit import TrainResult, set_grad_checkpointing, train
from support.training import make_task, read_weights


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
        (800, {}, "at least 800 images for one step of the effective batch, got 32"),
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


def test_recomputed_activations_give_the_same_gradients() -> None:
    images = torch.rand(2, 3, 64, 64)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = create_model("shvit_s1", num_classes=5)
        if recompute:
            set_grad_checkpointing(model)
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_model_that_cannot_recompute_is_refused() -> None:
    with pytest.raises(UsageError, match="with gradient checkpointing, got Linear"):
        set_grad_checkpointing(nn.Linear(2, 2))


@pytest.mark.slow
def test_compiled_model_trains_and_is_exported_plainly(tmp_path: Path) -> None:
    compiled = _run(tmp_path / "compiled", batch_size=8, batches=2, compile=True)
    plain = _run(tmp_path / "plain", batch_size=8, batches=2)
    expected, actual = (read_weights(result.last_checkpoint) for result in (plain, compiled))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4, msg=name)


STEPS = 200


def _train_digits(folder: Path, model: str, **options: Any) -> TrainResult:
    task = make_task(model=model, lr=1e-3, warmup_epochs=0.1, model_args={"drop_path_rate": 0.1})
    data = DigitsDataModule(batch_size=4)
    limits = {"limit_train_batches": STEPS, "limit_val_batches": 2}
    return train(task, data, folder=folder, epochs=1, progress=False, **limits, **options)


def _skipped(result: TrainResult) -> int:
    return torch.load(result.last_checkpoint, weights_only=True)["guard"]["skipped"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vim_tiny", "vmamba_tiny"])
def test_scan_models_train_in_bfloat16_without_a_bad_step(tmp_path: Path, model: str) -> None:
    result = _train_digits(tmp_path / "run", model, accelerator="cpu", precision="bf16-mixed")
    assert _skipped(result) == 0


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("model", ["vim_tiny", "vmamba_tiny"])
def test_scan_models_train_on_a_gpu_without_a_bad_step(tmp_path: Path, model: str, precision: str) -> None:
    result = _train_digits(tmp_path / "run", model, accelerator="gpu", precision=precision)
    assert _skipped(result) == 0
