"""Detection and segmentation recipes against the official configurations."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from lightspine.dense import create_detector, create_segmenter
from lightspine.models import get_record
from lightspine.recipes import PublishedRecipe, find_recipe, list_published, list_recipes
from lightspine.training.cli import TrainCLI
from lightspine.training.log_filters import filter_lightning_logs
from lightspine.training.lr_schedules import DecaySchedule, MilestoneSchedule
from lightspine.training.optim import dense_parameter_groups
from support.coco import content, square, write_coco
from support.dense import few_proposals
from support.images import write_image

PUBLISHED = [entry for entry in list_published() if not entry.recipe.startswith("classification/")]
DETECTION = [entry.recipe for entry in PUBLISHED if entry.recipe.startswith("detection/")]
SEGMENTATION = [entry.recipe for entry in PUBLISHED if entry.recipe.startswith("segmentation/")]
SMALL = (
    "detection/mask_rcnn_vmamba_tiny_coco_3x",
    "detection/retinanet_shvit_s4_coco_1x",
    "segmentation/semantic_fpn_efficientvim_m4_ade20k_40k",
    "segmentation/upernet_vim_tiny_ade20k_60k",
)


def read(name: str) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load(find_recipe(name).read_text())
    return recipe


def settings(name: str) -> dict[str, Any]:
    return dict(read(name)["model"]["init_args"])


def family(name: str) -> str:
    return get_record(settings(name)["model"]).family


def rate(schedule: Any, step: int, steps_per_epoch: int, lr: float) -> float:
    return float(schedule.rate(step, lr=lr, steps_per_epoch=steps_per_epoch, total_batch=16))


def test_every_dense_recipe_of_the_folders_is_published_in_the_table() -> None:
    names = [name for name in list_recipes() if name.startswith(("detection/", "segmentation/"))]
    assert sorted(DETECTION + SEGMENTATION) == names


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.recipe)
def test_head_of_a_recipe_tells_the_scores_of_the_table(entry: PublishedRecipe) -> None:
    head = [line for line in find_recipe(entry.recipe).read_text().splitlines() if line.startswith("#")]
    scores = [entry.box_ap, entry.mask_ap, entry.miou, entry.miou_ms]
    assert all(f"{score:.1f}" in head[1] for score in scores if score is not None)
    assert head[-1] == (
        f"# Command: lightspine train --config {entry.recipe} --data.init_args.root="
        f"{'COCO' if entry.data == 'COCO' else 'ADE20K'}"
    )


# Highest rate, decay, steps of warm-up, images per step.
COCO = {
    "vmamba": (1e-4, 0.05, 1000, 16),
    "efficientvim": (2e-4, 0.05, 500, 16),
    "shvit": (1e-4, 0.05, 500, 16),
    "efficientmod": (2e-4, 0.05, 500, 32),
    "vim": (1e-4, 0.1, 250, 64),
}


@pytest.mark.parametrize("name", DETECTION)
def test_detector_learns_at_the_published_rates(name: str) -> None:
    recipe, task = read(name), settings(name)
    lr, decay, warmup, batch = COCO[family(name)]
    # One row of VMamba was trained with 8 images per step, at the same rate.
    batch = 8 if name.endswith("_bs8") else batch
    trainer, data = recipe["trainer"], recipe["data"]["init_args"]
    assert (task["lr"], task["weight_decay"]) == (lr, decay)
    assert data["batch_size"] * trainer["devices"] == batch
    schedule = MilestoneSchedule(**task["schedule"])
    schedule.check()
    per_epoch = 117_266 // batch
    if family(name) == "vim":
        unit, first, second, end = 1, 163_889, 177_546, 184_375
        assert trainer["max_steps"] == end
        assert trainer["max_epochs"] == math.ceil(end / per_epoch)
    else:
        times = 3 if name.endswith("_3x") else 1
        # 8, 11 and 12 epochs; the long ones stop at 27, 33 and 36.
        unit, first, second, end = (per_epoch, 27, 33, 36) if times == 3 else (per_epoch, 8, 11, 12)
        assert trainer["max_epochs"] == end
    assert rate(schedule, 0, per_epoch, lr) == pytest.approx(lr * 0.001)
    assert rate(schedule, warmup // 2, per_epoch, lr) == pytest.approx(lr * (0.5 + 0.5 * 0.001))
    turns = ((warmup, 1), (first * unit - 1, 1), (first * unit, 0.1), (second * unit - 1, 0.1))
    for at, factor in (*turns, (second * unit, 0.01), (end * unit - 1, 0.01)):
        assert rate(schedule, at, per_epoch, lr) == pytest.approx(lr * factor)


# Highest rate, decay, steps, steps of warm-up, images per step.
ADE20K = {
    "vmamba": (6e-5, 0.01, 160_000, 1500, 16),
    "efficientvim": (2e-4, 1e-4, 40_000, 0, 32),
    "efficientmod": (2e-4, 1e-4, 40_000, 1000, 32),
    "vim_tiny": (2e-4, 0.1, 60_000, 1500, 32),
    "vim_small": (1e-4, 0.05, 60_000, 1500, 32),
}


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmenter_learns_at_the_published_rates(name: str) -> None:
    recipe, task = read(name), settings(name)
    of = task["model"] if family(name) == "vim" else family(name)
    lr, decay, steps, warmup, batch = ADE20K[of]
    trainer, data = recipe["trainer"], recipe["data"]["init_args"]
    assert (task["lr"], task["weight_decay"]) == (lr, decay)
    assert data["batch_size"] * trainer["devices"] == batch
    assert trainer["max_steps"] == steps
    assert trainer["max_epochs"] == math.ceil(steps / (20_210 // batch))
    schedule = DecaySchedule(**task["schedule"])
    schedule.check()
    ratio = {"efficientmod": 0.1}.get(of, 1e-6)
    for step in (0, warmup // 3, warmup, steps // 2, steps - 1):
        share = max(step - warmup, 0) / (steps - warmup) if of == "vmamba" else step / steps
        if of == "efficientmod":
            regular = lr * (1 + math.cos(math.pi * share)) / 2
        elif of == "efficientvim":
            regular = 1e-6 + (lr - 1e-6) * (1 - share) ** 0.9
        else:
            regular = lr * (1 - share)
        warm = 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - ratio)
        assert rate(schedule, step, 1263, lr) == pytest.approx(regular * warm, rel=1e-9)


@pytest.mark.parametrize("name", DETECTION + SEGMENTATION)
def test_backbone_is_wired_as_published(name: str) -> None:
    task, of = settings(name), family(name)
    segments = name.startswith("segmentation/")
    assert task.get("norm", "none") == (
        "layer" if of == "vmamba" or (of == "efficientvim" and not segments) else "none"
    )
    assert task.get("freeze_batch_norm", False) == (of in ("efficientvim", "shvit"))
    expected = {"vmamba": ["norm"], "vim": None if segments else ["pos_embed"]}.get(of, [])
    assert task.get("undecayed") == expected
    # Weights as trained, not EMA; for SHViT and Vim these are the published ones.
    assert task.get("weights", "auto") == ("auto" if of in ("shvit", "vim") else "model")
    drop = {"tiny": 0.2, "small": 0.3, "base": 0.6}
    drop_path = (task.get("model_args") or {}).get("drop_path_rate", 0.0)
    if of == "vmamba":
        size = task["model"].split("_")[1]
        old = 0.3 if segments else 0.2
        assert drop_path == (old if task["model"].endswith("_v0") else drop[size])
    else:
        assert drop_path == {"efficientmod": 0.02, "vim": 0.1}.get(of, 0.0)
    if of == "vim":
        assert task["layer_decay"] == ((0.92 if "tiny" in name else 0.95) if segments else 0.837)


@pytest.mark.parametrize("name", DETECTION + SEGMENTATION)
def test_data_is_prepared_as_published(name: str) -> None:
    data = read(name)["data"]["init_args"]
    if name.startswith("segmentation/"):
        # Defaults of the module: crops of 512 px, mmseg's ratios, photometric distortion.
        assert data.keys() <= {"root", "batch_size", "num_workers", "val_divisor"}
        assert data.get("val_divisor", 1) == (32 if "semantic_fpn" in name else 1)
        return
    kind = "large_scale_jitter" if "vim_" in name and "efficient" not in name else "flip"
    assert data["augmentation"] == ("multi_scale" if name.endswith("_3x") else kind)
    assert data.get("masks", True) == ("retinanet" not in name)


def is_spared(name: str, parameter: torch.Tensor, of: str, segments: bool) -> bool:
    """Return whether the official code exempts a parameter from weight decay."""
    if of == "vmamba":
        # By the names here, which say "norm" of the stem's too; the recipe tells it.
        return "norm" in name
    if of != "vim":
        return False
    if segments:
        return parameter.ndim == 1 or name.endswith((".bias", "pos_embed", "cls_token"))
    return name.endswith("pos_embed")


@pytest.mark.parametrize("name", DETECTION + SEGMENTATION)
def test_groups_of_the_optimizer_are_the_published_ones(name: str) -> None:
    task, of = settings(name), family(name)
    segments = name.startswith("segmentation/")
    create: Any = create_segmenter if segments else create_detector
    with torch.device("meta"):
        network = create(
            task["head"],
            task["model"],
            150 if segments else 80,
            model_args=task.get("model_args"),
            norm=task.get("norm", "none"),
            freeze_batch_norm=task.get("freeze_batch_norm", False),
        )
    keys = ("lr", "weight_decay", "undecayed", "layer_decay", "layer_decay_blocks")
    groups = dense_parameter_groups(network, **{key: task[key] for key in keys if key in task})
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for key, parameter in network.named_parameters():
        spared = is_spared(key, parameter, of, segments)
        factor = vim_factor(key, task) if of == "vim" else 1.0
        expected = (task["lr"] * factor, 0.0 if spared else task["weight_decay"])
        assert found[id(parameter)] == pytest.approx(expected), key


def vim_factor(name: str, task: dict[str, Any]) -> float:
    """Return the learning-rate factor by official layer number: stem 0, block i: i + 1, heads 25."""
    block = re.search(r"\.blocks\.(\d+)\.", name)
    if re.search(r"\.(pos_embed|cls_token|stem\.\w+)$", name):
        layer = 0
    else:
        layer = int(block[1]) + 1 if block and task.get("layer_decay_blocks", True) else 25
    return float(task["layer_decay"] ** (25 - layer))


def small_data(name: str, folder: Path) -> list[str]:
    """Write two images in the recipe's data layout and return the matching flags."""
    if name.startswith("detection/"):
        file = write_coco(folder, content(square(), square(id=2, image_id=2), images=2))
        places = {"annotations": file, "images": folder}
        return [
            f"--data.{split}_{part}={place}" for split in ("train", "val") for part, place in places.items()
        ]
    for part in ("training", "validation"):
        (folder / "annotations" / part).mkdir(parents=True)
        for number in range(2):
            write_image(folder / "images" / part / f"{number}.png", (90, 60, 200), size=(64, 48), seed=number)
            labels = Image.new("L", (64, 48), 7)
            labels.paste(8, (0, 0, 32, 48))
            labels.save(folder / "annotations" / part / f"{number}.png")
    rows = "".join(f"{number}\t0.1\t1\t1\tthing {number}\n" for number in range(1, 151))
    (folder / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{rows}")
    return [f"--data.root={folder}"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in SMALL else pytest.param(name, marks=pytest.mark.slow)
        for name in DETECTION + SEGMENTATION
    ],
)
def test_recipe_builds_and_takes_a_step(name: str, tmp_path: Path) -> None:
    flags = ["--folder", str(tmp_path / "run"), "--model.checkpoint=null", "--trainer.devices=1"]
    flags += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--data.batch_size=2"]
    flags += ["--data.num_workers=0", *small_data(name, tmp_path / "data")]
    if name.startswith("detection/"):
        flags += ["--data.shorter=64", "--data.longest=64", "--data.size=64"]
    else:
        flags += ["--data.crop=[64, 64]", "--data.scale=[64, 64]"]
    with filter_lightning_logs():
        cli = TrainCLI(["--config", str(find_recipe(name)), *flags])
    few_proposals(cli.model.model)
    batch = next(iter(cli.datamodule.train_dataloader()))
    losses = cli.model.model(*batch[:2])
    loss = sum(losses.values())
    loss.backward()
    assert loss.isfinite()
    assert cli.model.num_classes == (2 if name.startswith("detection/") else 150)
