"""Segmentation task on real images."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.data.segmentation import SlidingWindowInference
from lightspine.dense import load_network
from lightspine.dense.metrics import SegmentationMetrics
from lightspine.errors import UsageError
from lightspine.training.resume import TrainingInterruptedError
from support.coco import unpack
from support.dense_runs import run, segmentation_data, segmentation_task
from support.interruption import KillAtStep
from support.training import same_weights


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("coco_free_semantic", tmp_path_factory)


def test_run_leaves_scores_and_a_segmenter_that_reaches_them(semantic: Path, tmp_path: Path) -> None:
    data = segmentation_data(semantic)
    result = run(tmp_path / "run", segmentation_task(), data, limit_val_batches=1)
    network, saved = load_network(result.weights)
    assert (saved.kind, saved.class_names, saved.settings["scale"]) == (
        "segmenter",
        data.class_names,
        [96, 64],
    )
    batch = next(iter(data.val_dataloader()))
    metrics = SegmentationMetrics(data.class_names)
    with torch.inference_mode():
        for name, image, labels in zip(batch.names, batch.images, batch.labels, strict=True):
            found = SlidingWindowInference().classify(network, image, tuple(labels.shape))
            metrics.update([name], [found], [labels])
    expected = {f"val_{name}": pytest.approx(value, abs=1e-4) for name, value in metrics.compute().items()}
    assert {name: result.history[-1][name] for name in expected} == expected


def test_auxiliary_loss_is_logged(semantic: Path, tmp_path: Path) -> None:
    task = segmentation_task(head="upernet")
    result = run(tmp_path / "run", task, segmentation_data(semantic), epochs=1, limit_val_batches=1)
    row = result.history[0]
    assert row["train_loss"] == pytest.approx(
        row["train_loss_segmentation"] + row["train_loss_auxiliary"], 1e-4
    )


def test_run_of_so_many_steps_ends_with_a_validation(semantic: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path / "run",
        segmentation_task(),
        segmentation_data(semantic),
        epochs=10,
        max_steps=5,
        limit_val_batches=1,
        check_val_every_n_epoch=2,
    )
    assert ["val_mIoU" in row for row in result.history] == [False, True, True]
    assert result.score == result.history[-1]["val_mIoU"]
    assert torch.load(result.last_checkpoint, weights_only=True)["global_step"] == 5


def test_last_epoch_is_validated_whatever_the_interval(semantic: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path / "run",
        segmentation_task(),
        segmentation_data(semantic),
        epochs=3,
        limit_val_batches=1,
        check_val_every_n_epoch=2,
    )
    assert ["val_mIoU" in row for row in result.history] == [False, True, True]


def test_stopped_run_is_resumed_to_the_same_bits(semantic: Path, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {
            "task": segmentation_task(head="upernet", model_args={"out_indices": (1, 2, 3, 4)}),
            "data": segmentation_data(semantic),
            "save_every_steps": 1,
            "limit_train_batches": 3,
            "limit_val_batches": 1,
        }

    whole = run(tmp_path / "whole", **options())
    with pytest.raises(TrainingInterruptedError):
        run(tmp_path / "parts", **options(), callbacks=[KillAtStep(4, signal.SIGINT)])
    torch.manual_seed(99)
    parts = run(tmp_path / "parts", **options(), resume="auto")
    assert same_weights(parts.weights, whole.weights)
    assert parts.score == whole.score


def test_validation_looks_at_the_image_as_the_task_says(semantic: Path, tmp_path: Path) -> None:
    test = SlidingWindowInference(window=(48, 48), stride=(32, 32), flip=True)
    result = run(
        tmp_path / "run",
        segmentation_task(test=test),
        segmentation_data(semantic),
        epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
    )
    settings = load_network(result.weights)[1].settings
    assert (settings["window"], settings["stride"], settings["flip"]) == ([48, 48], [32, 32], True)


def test_wrong_test_is_refused() -> None:
    with pytest.raises(UsageError, match="expected ratios above 0"):
        segmentation_task(test=SlidingWindowInference(ratios=(0.0,)))
