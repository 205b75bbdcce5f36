"""Detection task on real images."""

import csv
import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lightspine
from lightspine.data.detection import collate_detection
from lightspine.dense import load_network
from lightspine.dense.inference import detect_by_size
from lightspine.dense.metrics import CocoMetrics
from lightspine.errors import UsageError
from lightspine.training.resume import TrainingInterruptedError
from support.coco import unpack
from support.dense_runs import SMALL_MAPS, SMALL_MODEL, detection_data, detection_task, run, segmentation_task
from support.interruption import KillAtStep
from support.training import same_weights


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("coco_free", tmp_path_factory)


def test_run_leaves_scores_curves_and_a_detector(coco: Path, tmp_path: Path) -> None:
    data = detection_data(coco)
    result = run(tmp_path / "run", detection_task(), data)
    with (result.folder / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    expected = {"val_box_AP", "val_box_APs", "val_box_ARl", "train_loss_classification", "data_share"}
    assert expected <= last.keys()
    assert (result.folder / "curves.png").stat().st_size > 10_000
    network, saved = load_network(result.weights)
    assert saved.class_names == data.class_names
    assert result.score_name == "val_box_AP"
    assert network(next(iter(data.val_dataloader())).images[:1])[0]["boxes"].shape[1] == 4


@pytest.mark.parametrize("head", ["mask_rcnn", pytest.param("cascade_mask_rcnn", marks=pytest.mark.slow)])
def test_masks_are_scored_where_the_head_finds_them(head: Any, coco: Path, tmp_path: Path) -> None:
    task = detection_task(head=head, detections_per_image=5)
    result = run(tmp_path / "run", task, detection_data(coco, masks=True), epochs=1, limit_val_batches=1)
    assert {"val_mask_AP", "val_mask_AR", "train_loss_mask"} <= result.history[0].keys()


def test_validation_scores_are_those_of_the_exported_detector(coco: Path, tmp_path: Path) -> None:
    data = detection_data(coco)
    task = detection_task(lr=3e-3, score_threshold=0.01)
    result = run(tmp_path / "run", task, data, limit_train_batches=1.0, limit_val_batches=1.0, epochs=3)
    network, _ = load_network(result.weights)
    metrics = CocoMetrics(data.val_annotations)
    with torch.inference_mode():
        for batch in data.val_dataloader():
            found = detect_by_size(network, batch.images)
            metrics.update([int(t["image_id"]) for t in batch.targets], found)
    expected = metrics.compute()["box"]
    # `run` exports the weights of the last epoch.
    last = result.history[-1]
    assert last["val_box_AR"] == pytest.approx(expected["AR"], abs=1e-6)
    assert last["val_box_AR"] > 0


def test_stopped_run_is_resumed_to_the_same_bits(coco: Path, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        task = detection_task(detections_per_image=3, ema_decay=0.9)
        return {"task": task, "data": detection_data(coco), "save_every_steps": 1}

    small = {"limit_train_batches": 3, "limit_val_batches": 1}
    whole = run(tmp_path / "whole", **options(), **small)
    with pytest.raises(TrainingInterruptedError):
        run(tmp_path / "parts", **options(), **small, callbacks=[KillAtStep(4, signal.SIGINT)])
    torch.manual_seed(99)
    parts = run(tmp_path / "parts", **options(), **small, resume="auto")
    assert same_weights(parts.weights, whole.weights)
    assert parts.score == whole.score


def test_overfitting_one_image_lowers_every_loss(coco: Path) -> None:
    data = detection_data(coco, masks=True, augmentation="none", batch_size=1)
    task = detection_task(head="mask_rcnn")
    images, targets, _ = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    totals = []
    for _ in range(24):
        torch.manual_seed(0)
        losses = task(images, targets)
        totals.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    # The losses of boxes and masks rise first, as the class scores give more proposals an object to fit.
    highest = {name: max(step[name] for step in totals) for name in totals[0]}
    worse = [name for name in highest if not totals[-1][name] < 0.9 * highest[name]]
    assert not worse


def test_batch_without_objects_gives_a_finite_loss(coco: Path) -> None:
    data = detection_data(coco, masks=True, augmentation="none")
    batch = next(iter(data.train_dataloader()))
    empty = [
        {name: value[:0] if name in ("boxes", "labels", "masks") else value for name, value in target.items()}
        for target in batch.targets
    ]
    losses = detection_task(head="mask_rcnn")(batch.images, empty)
    assert all(torch.isfinite(value) for value in losses.values())


def test_bad_image_of_training_is_named_and_does_not_stop_the_run(
    coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = detection_data(coco)
    broken = tmp_path / "broken"
    broken.mkdir()
    notes = data.train_annotations
    for position in range(len(notes)):
        path = notes.path(position)
        content = path.read_bytes()
        (broken / path.name).write_bytes(content if position else content[: len(content) // 3])
    data = detection_data(coco, train_images=broken)
    task = detection_task()
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", task, data, epochs=1, limit_train_batches=1.0, limit_val_batches=1)
    assert [Path(path).name for path in task.bad_images.reasons] == [notes.path(0).name]


def test_masks_that_the_head_lacks_are_refused(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected data with masks=false for retinanet over"):
        run(tmp_path / "run", detection_task(), detection_data(coco, masks=True))


def test_data_without_objects_is_refused(tmp_path: Path) -> None:
    from lightspine.data.modules import DigitsDataModule

    with pytest.raises(UsageError, match="expected a CocoDataModule to train retinanet over"):
        run(tmp_path / "run", detection_task(num_classes=10), DigitsDataModule(batch_size=8))


def test_segmenter_on_objects_is_refused(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a SegmentationDataModule to train semantic_fpn"):
        run(tmp_path / "run", segmentation_task(num_classes=80), detection_data(coco))


def test_frozen_stages_start_from_a_checkpoint_and_stay(coco: Path, tmp_path: Path) -> None:
    classifier = lightspine.create_model("shvit_s1", num_classes=3)
    path = lightspine.save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    task = detection_task(model="shvit_s1", model_args={}, checkpoint=path, frozen_stages=0)
    before = {name: value.clone() for name, value in task.backbone.state_dict().items()}
    run(tmp_path / "run", task, detection_data(coco), epochs=1, limit_train_batches=1, limit_val_batches=1)
    after = task.backbone.state_dict()
    stem = [name for name in before if name.startswith("stem") or name.startswith("patch_embed")]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert stem
    assert not set(stem) & set(changed)
    assert changed


def test_file_tells_how_the_detector_looks_at_images(coco: Path, tmp_path: Path) -> None:
    task = detection_task(resize=None, detections_per_image=7)
    result = run(tmp_path / "run", task, detection_data(coco), epochs=1, limit_val_batches=1)
    options = load_network(result.weights)[1].options
    assert json.loads(json.dumps(options)) == {
        "model_args": json.loads(json.dumps(SMALL_MAPS)),
        "norm": "none",
        "freeze_batch_norm": False,
        "channels": 16,
        "resize": None,
        "resize_rounding": "nearest",
        "score_threshold": 0.05,
        "detections_per_image": 7,
        "anchor_scale": 1.0,
    }


def test_another_size_than_that_of_the_training_is_told(coco: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightspine"):
        detection_task(resize=None).prepare(detection_data(coco))
    expected = "images are resized to [64, 96] px in training, but keep their size in validation"
    assert expected in caplog.text


def test_items_of_a_detector_batch_may_all_be_bad() -> None:
    assert collate_detection([]).images == []
    assert SMALL_MODEL in detection_task().model_name
