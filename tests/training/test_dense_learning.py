"""Detectors and segmenters learn: overfitting eight images, and nuclei from scratch."""

import json
from pathlib import Path

import numpy as np
import pytest

from lightspine.data.detection import read_coco, select_images
from lightspine.data.modules import CocoDataModule
from lightspine.training.cli import train_recipe
from lightspine.training.detection import DetectionTask
from lightspine.training.fit import train
from support.coco import unpack


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mask_rcnn_learns_eight_images_by_heart(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = unpack("coco_free", tmp_path_factory)
    notes = read_coco(root / "annotations" / "instances_train2017.json", root / "train2017")
    objects = notes.count_non_crowd()
    eight = select_images(notes, np.flatnonzero((objects > 0) & (objects <= 6))[:8])
    file = tmp_path / "eight.json"
    file.write_text(json.dumps(eight.to_coco()))
    places = {"train_annotations": file, "val_annotations": file}
    places |= {"train_images": root / "train2017", "val_images": root / "train2017"}
    data = CocoDataModule(
        root, **places, augmentation="none", shorter=192, longest=384, batch_size=4, num_workers=0
    )
    task = DetectionTask(
        "shvit_s1",
        80,
        head="mask_rcnn",
        model_args={"stem_stride": 8},
        channels=64,
        resize=(192, 384),
        lr=1e-3,
        weight_decay=0.0,
        warmup_epochs=10,
    )
    # Fewer proposals than the published 512 and 1000, enough for small images.
    task.network.roi_heads.fg_bg_sampler.batch_size_per_image = 64
    task.network.rpn._pre_nms_top_n = {"training": 500, "testing": 300}
    task.network.rpn._post_nms_top_n = {"training": 200, "testing": 100}
    result = train(
        task,
        data,
        folder=tmp_path / "run",
        epochs=75,
        check_val_every_n_epoch=75,
        gradient_clip=1.0,
        accelerator="cpu",
        progress=False,
    )
    assert result.history[-1]["val_box_AP50"] > 80
    assert result.history[-1]["val_mask_AP50"] > 80


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_segmenter_finds_nuclei_after_an_epoch(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = unpack("nuclei_dsb2018", tmp_path_factory)
    overrides = [f"--data.root={root}", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    result = train_recipe(
        "nuclei_semantic_fpn_shvit_s1", folder=tmp_path / "run", overrides=overrides, progress=False
    )
    # Predicting background everywhere gives 43.7 %.
    assert result.score > 60
