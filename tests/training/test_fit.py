"""Complete training runs: files, interruption, divergence, exports and memory options."""

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightspine.data.modules import DigitsDataModule, ImageFolderDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.models.factory import create_model, load_model
from lightspine.training.classification import ClassificationTask
from lightspine.training.fit import TrainingInterruptedError, TrainResult, set_grad_checkpointing, train
from support.images import truncate, write_folder, write_image
from support.training import make_task, read_weights, run, same_weights


class AtEpoch(pl.Callback):
    """Calls a function at the start of an epoch."""

    def __init__(self, epoch: int, action: Any) -> None:
        self.epoch = epoch
        self.action = action

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.action(pl_module)


def _interrupt(_: Any) -> None:
    # Sent by a terminal at Ctrl-C.
    os.kill(os.getpid(), signal.SIGINT)


def _poison(task: Any) -> None:
    with torch.no_grad():
        next(task.model.parameters()).fill_(float("inf"))


def test_run_leaves_files_and_scores(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "best.ckpt", "curves.png", "last.ckpt", "metrics.csv", "model.safetensors"}
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [0, 1]
    assert float(rows[-1]["val_top1"]) == pytest.approx(result.score)
    assert {"train_loss", "val_loss", "val_top1", "val_top5", "lr", "seconds"} <= set(rows[0])
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_exported_model_is_the_trained_one(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    model, saved = load_model(result.weights)
    trained = read_weights(result.last_checkpoint)
    assert all(torch.equal(trained[f"model.{key}"], value) for key, value in model.state_dict().items())
    assert saved.class_names == [str(digit) for digit in range(10)]
    assert saved.preprocessing["input_size"] == [3, 32, 32]


def test_training_learns_the_digits(tmp_path: Path) -> None:
    result = run(tmp_path / "run", task=make_task(lr=5e-3), epochs=2, limit_train_batches=None)
    assert result.score > 50
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_same_seed_gives_same_weights(tmp_path: Path) -> None:
    first, again = (run(tmp_path / name, task=make_task(mixup=0.2), epochs=1) for name in "ab")
    assert same_weights(first.weights, again.weights)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, ema_decay: float | None) -> None:
    options = {"mixup": 0.2, "ema_decay": ema_decay}
    whole = run(tmp_path / "whole", task=make_task(**options), epochs=3)
    with pytest.raises(TrainingInterruptedError):
        run(tmp_path / "parts", task=make_task(**options), callbacks=[AtEpoch(2, _interrupt)], epochs=3)
    # A random state different from that of the interrupted run.
    torch.manual_seed(99)
    last = tmp_path / "parts" / "last.ckpt"
    parts = run(tmp_path / "ignored", task=make_task(**options), resume=last, epochs=3)
    assert parts.folder == (tmp_path / "parts").resolve()
    assert [row["val_loss"] for row in parts.history] == [row["val_loss"] for row in whole.history]
    assert same_weights(parts.weights, whole.weights)


def test_interrupt_keeps_the_last_checkpoint_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingInterruptedError, match=r"interrupted; the last checkpoint is .*last\.ckpt"
    ) as caught:
        run(tmp_path / "run", epochs=3, callbacks=[AtEpoch(1, _interrupt)])
    assert caught.value.exit_status == 130
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == 0


def test_interrupt_in_the_first_epoch_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterruptedError, match="no epoch was finished"):
        run(tmp_path / "run", callbacks=[AtEpoch(0, _interrupt)])


def test_interrupt_leaves_the_signal_handler_as_it_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterruptedError):
        run(tmp_path / "run", callbacks=[AtEpoch(0, _interrupt)])
    assert signal.getsignal(signal.SIGINT) is before


def test_non_finite_losses_in_a_row_stop_and_keep_the_good_checkpoint(tmp_path: Path) -> None:
    message = (
        r"3 non-finite steps in a row; last: non-finite loss at step 8 \(epoch 1\), learning rate 0\.0\d+; "
    )
    named = r"the weight conv1\.0\.weight is not finite; lower the learning rate.*; the last checkpoint is "
    with pytest.raises(LightspineError, match=message + named) as caught:
        run(tmp_path / "run", task=make_task(max_bad_steps=3), epochs=3, callbacks=[AtEpoch(1, _poison)])
    assert caught.value.exit_status == 1
    weights = read_weights(tmp_path / "run" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in weights.values())


class BlankBatch(pl.Callback):
    """Makes the images of one batch infinite."""

    def on_train_batch_start(self, trainer: pl.Trainer, _: Any, batch: Any, *__: Any) -> None:
        if trainer.global_step == 4:
            batch.images.fill_(float("inf"))


def test_bad_batch_is_skipped_counted_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(tmp_path / "run", callbacks=[BlankBatch()])
    assert "skipped a step: non-finite loss at step 4 (epoch 0)" in caplog.text
    assert "the input images are not finite" in caplog.text
    assert [row["skipped_steps"] for row in result.history] == [1, 1]
    weights = read_weights(result.last_checkpoint)
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_diverging_rate_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match=r"non-finite steps in a row|validation loss is not finite"):
        run(tmp_path / "run", task=make_task(lr=1e30, optimizer="sgd"))


def test_averaged_weights_are_validated_and_exported(tmp_path: Path) -> None:
    result = run(tmp_path / "run", task=make_task(ema_decay=0.9))
    stored = torch.load(result.last_checkpoint, weights_only=True)
    exported = load_model(result.weights)[0].state_dict()
    raw = load_model(result.raw_weights)[0].state_dict()
    live, averaged = stored["current_model_state"], stored["state_dict"]
    assert all(torch.equal(live[f"model.{key}"], value) for key, value in raw.items())
    assert all(torch.equal(averaged[f"model.{key}"], value) for key, value in exported.items())
    assert any(not torch.equal(live[key], averaged[key]) for key in averaged)


def test_best_epoch_is_exported_unless_the_last_is_asked_for(tmp_path: Path) -> None:
    # The classifier is destroyed after the first epoch, so the first one is the best.
    def forget(task: Any) -> None:
        with torch.no_grad():
            task.model.get_classifier().weight.zero_()
        task.trainer.optimizers[0].param_groups[0]["lr"] = 0

    result = train(
        make_task(lr=5e-3),
        DigitsDataModule(batch_size=32),
        folder=tmp_path / "run",
        epochs=2,
        accelerator="cpu",
        progress=False,
        callbacks=[AtEpoch(1, forget)],
        limit_train_batches=6,
        limit_val_batches=2,
    )
    best = max(row["val_top1"] for row in result.history)
    assert result.score == result.best_score == best
    exported = load_model(result.weights)[0].state_dict()
    assert all(
        torch.equal(read_weights(result.best_checkpoint)[f"model.{k}"], v) for k, v in exported.items()
    )


@pytest.mark.filterwarnings(
    "ignore:The dirpath has changed:UserWarning"
)  # Lightning's, about the same folder
def test_last_epoch_is_exported_if_the_best_is_not_in_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(tmp_path / "first", epochs=1)
    (tmp_path / "copy").mkdir()
    shutil.copy(first.last_checkpoint, tmp_path / "copy")
    result = run(tmp_path / "copy", resume="auto", epochs=1, export="best")
    assert same_weights(result.weights, first.weights)
    assert "best.ckpt is missing: the weights of the last epoch are exported" in caplog.text


def test_resumed_run_with_workers_sees_the_images_of_its_epoch(tmp_path: Path) -> None:
    def train_folder(name: str, **options: Any) -> TrainResult:
        data = ImageFolderDataModule(root, image_size=32, batch_size=4, num_workers=2)
        options = {"epochs": 2, "accelerator": "cpu", "progress": False} | options
        return train(make_task(num_classes=3), data, folder=tmp_path / name, **options)

    root = write_folder(tmp_path / "images", count=8)
    whole = train_folder("whole")
    with pytest.raises(TrainingInterruptedError):
        train_folder("parts", callbacks=[AtEpoch(1, _interrupt)])
    parts = train_folder("parts", resume=tmp_path / "parts" / "last.ckpt")
    assert same_weights(parts.weights, whole.weights)


def test_bad_images_are_counted_named_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "images", count=8, splits=("train", "val"))
    truncate(write_image(root / "train" / "red" / "3.jpg", (200, 0, 0), size=(99, 99)))
    write_image(root / "val" / "blue" / "5.jpg", (0, 0, 200), size=(30, 30))
    data = ImageFolderDataModule(root, image_size=32, batch_size=8, num_workers=0)
    result = train(
        make_task(num_classes=3), data, folder=tmp_path / "run", epochs=2, accelerator="cpu", progress=False
    )
    assert {Path(path).relative_to(root).as_posix() for path in result.skipped} == {
        "train/red/3.jpg",
        "val/blue/5.jpg",
    }
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("skipped 2 images: ")
    assert "5.jpg is 30x30 px" in warnings[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_run_stops_when_every_image_is_bad(tmp_path: Path, split: str) -> None:
    root = write_folder(tmp_path / "images", count=2, splits=("train", "val"))
    for path in (root / split).rglob("*.jpg"):
        path.write_bytes(b"")
    data = ImageFolderDataModule(root, image_size=32, batch_size=2, num_workers=0)
    with pytest.raises(
        LightspineError, match=r"none of the \w+ images can be used; cannot read image .*\.jpg"
    ):
        train(
            make_task(num_classes=3),
            data,
            folder=tmp_path / "run",
            epochs=1,
            accelerator="cpu",
            progress=False,
        )


def test_table_of_the_epochs_is_printed_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "run", progress=True)
    header, *rows = capsys.readouterr().err.splitlines()
    assert header.split() == [
        "epoch",
        "train_loss",
        "val_loss",
        "val_top1",
        "%",
        "val_top5",
        "%",
        "lr",
        "time",
        "data",
        "wait",
    ]
    assert [row.split()[0] for row in rows] == ["1/2", "2/2"]
    shown = [float(row.split()[3]) for row in rows]
    assert shown == pytest.approx([row["val_top1"] for row in result.history], abs=0.005)
    assert all(len(row) < 120 for row in rows)


def test_nothing_is_written_without_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_class_counts_of_task_and_data_must_agree(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a task with 10 classes, got 4"):
        train(make_task(num_classes=4), DigitsDataModule(), folder=tmp_path / "run")


def run_vit(folder: Path, *, batch_size: int, batches: int, **options: Any) -> TrainResult:
    # Layer norms only, so that an image does not depend on its batch; plain steps along the gradient.
    task = ClassificationTask("test_vit", 10, model_args={"img_size": 32}, optimizer="sgd", lr=0.05)
    data = DigitsDataModule(batch_size=batch_size, augment=False)
    limits = {"limit_train_batches": batches, "limit_val_batches": 2, "accelerator": "cpu"}
    return train(task, data, folder=folder, epochs=2, progress=False, **limits, **options)


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
    compiled = run_vit(tmp_path / "compiled", batch_size=8, batches=2, compile=True)
    plain = run_vit(tmp_path / "plain", batch_size=8, batches=2)
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
