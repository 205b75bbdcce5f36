"""Published recipes against the papers: learning rates, weight decay, EMA and first steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightspine.errors import UsageError
from lightspine.models import get_record
from lightspine.recipes import find_recipe, list_published, list_recipes
from lightspine.training import distillation
from lightspine.training.classification import ClassificationTask
from lightspine.training.cli import TrainCLI
from lightspine.training.log_filters import filter_lightning_logs
from lightspine.training.lr_schedules import CosineSchedule
from lightspine.training.optim import create_optimizer
from support.images import write_folder
from support.reference import figure_images, fill_checkpoint, read_figure, write_official_file

PUBLISHED = [entry for entry in list_published() if entry.recipe.startswith("classification/")]
NAMES = [entry.recipe for entry in PUBLISHED]
SMALL = {
    "vmamba_tiny": "vmamba/vmambav2v_tiny",
    "vim_tiny": "vim/vim_tiny",
    "efficientvim_m1": "efficientvim/EfficientViM_M1",
    "shvit_s1": "shvit/shvit_s1",
    "efficientmod_xxs": "efficientmod/efficientMod_xxs",
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(find_recipe(name).read_text())


def settings(name: str) -> dict[str, Any]:
    return read(name)["model"]["init_args"]


def family(name: str) -> str:
    return get_record(settings(name)["model"]).family


def batch_of(recipe: dict[str, Any]) -> int:
    return recipe["data"]["init_args"]["batch_size"] * recipe["trainer"]["devices"]


# Highest and lowest rate, rate of the first step, epochs of warm-up, of the cosine and of the whole run.
RATES = {
    "vmamba": (1e-3, 1e-5, 1e-6, 20, 300, 300),
    "vim": (1e-3, 1e-5, 1e-6, 5, 300, 300),
    "vim fine-tuning": (1e-5, 1e-5, 1e-5, 5, 30, 30),
    "efficientvim": (2e-3, 2e-5, 2e-6, 20, 300, 310),
    "efficientvim e450": (2e-3, 2e-5, 2e-6, 20, 450, 460),
    "shvit": (4e-3, 1e-5, 1e-6, 5, 300, 300),
    "shvit fine-tuning": (4e-3, 1e-5, 1e-6, 5, 30, 30),
    "efficientmod": (4e-3, 1e-5, 1e-6, 5, 300, 310),
}


AVERAGES = {
    "vmamba": 0.9999,
    "vim": 0.99996,
    "efficientvim": 0.9995,
    "shvit": 0.99996,
    "efficientmod": 0.9998,
}


def kind(name: str) -> str:
    if name.endswith("_e450"):
        return "efficientvim e450"
    return family(name) + (" fine-tuning" if "checkpoint" in settings(name) else "")


@pytest.mark.parametrize("name", NAMES)
def test_rate_is_the_published_one_at_every_turn(name: str) -> None:
    highest, lowest, first, warmup, epochs, total = RATES[kind(name)]
    recipe = read(name)
    assert recipe["trainer"]["max_epochs"] == total
    schedule = CosineSchedule(**recipe["model"]["init_args"]["schedule"])
    schedule.check()

    def rate(epoch: float) -> float:
        return schedule.rate(
            round(epoch * 1000),
            lr=recipe["model"]["init_args"]["lr"],
            steps_per_epoch=1000,
            total_batch=batch_of(recipe),
        )

    def cosine(share: float) -> float:
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * share)) / 2

    of = kind(name).split()[0]
    # Schedules by epoch lag by one epoch or not at all, schedules by step by one of 1000 steps.
    lag = {"shvit": 1, "vim": 1, "efficientmod": 0}.get(of, 0.001)
    assert rate(0) == pytest.approx(first)
    assert rate(lag + warmup / 5) == pytest.approx(first + (highest - first) / 5)
    middle = (warmup + epochs) / 2
    # VMamba and EfficientViM start the cosine after the warm-up, the others at the first epoch.
    share = 0.5 if of in ("vmamba", "efficientvim") else math.floor(middle) / epochs
    assert rate(lag + (math.floor(middle) if share != 0.5 else middle)) == pytest.approx(cosine(share))
    assert rate(total + lag) == pytest.approx(lowest)


@pytest.mark.parametrize("name", NAMES)
def test_rate_changes_with_the_unit_that_was_published(name: str) -> None:
    schedule = CosineSchedule(**settings(name)["schedule"])
    first, later = (
        schedule.rate(step, lr=1e-3, steps_per_epoch=100, total_batch=1024) for step in (2000, 2099)
    )
    assert (first == later) == (family(name) in ("vim", "shvit", "efficientmod"))


@pytest.mark.parametrize("name", NAMES)
def test_two_first_epochs_are_alike_where_the_official_schedule_lags(name: str) -> None:
    schedule = CosineSchedule(**settings(name)["schedule"])
    rates = [schedule.rate(step, lr=1e-2, steps_per_epoch=10, total_batch=512) for step in (0, 10)]
    assert (rates[0] == rates[1]) == (family(name) in ("vim", "shvit"))


@pytest.mark.parametrize("name", NAMES)
def test_average_clipping_and_augmentation_are_the_published_ones(name: str) -> None:
    recipe, task = read(name), settings(name)
    data, trainer = recipe["data"]["init_args"], recipe["trainer"]
    record = get_record(task["model"])
    assert task["ema_decay"] == AVERAGES[record.family]
    raw = record.family in ("vim", "shvit") or name.endswith("vmamba_tiny_v0")
    assert task["export_weights"] == ("raw" if raw else "ema")
    assert trainer.get("gradient_clip_val") == {"vmamba": 5.0, "efficientvim": 0.02}.get(record.family)
    assert task.get("agc") == {"shvit": 0.02}.get(record.family)
    assert (task["mixup"], task["cutmix"], task["label_smoothing"]) == (0.8, 1.0, 0.1)
    assert data.get("repeats", 1) == (3 if record.family in ("vim", "shvit") else 1)
    augmentation = data["augmentation"]
    assert augmentation["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert augmentation["erasing"] == 0.25
    assert augmentation.get("erasing_after_mixing", False) == (record.family == "efficientmod")
    assert augmentation["interpolation"] == ("random" if record.family == "efficientmod" else "bicubic")
    tuned = {"classification/shvit_s4_384": 384, "classification/shvit_s4_512": 512}
    assert data["image_size"] == tuned.get(name, record.input_size[1])
    assert trainer["precision"] == ("32-true" if record.family in ("vim", "shvit") else "16-mixed")


def test_teachers_and_self_distillation_are_where_they_were_published() -> None:
    taught = {name.removeprefix("classification/") for name in NAMES if "teacher" in settings(name)}
    dist = {f"efficientvim_m{i}_dist" for i in (1, 2, 3, 4)} | {f"shvit_s{i}_dist" for i in (1, 2, 3, 4)}
    assert taught == dist | {f"efficientmod_{size}_dist" for size in ("xxs", "xs", "s")}
    mesa = {name.removeprefix("classification/") for name in NAMES if "mesa" in settings(name)}
    assert mesa == {f"efficientvim_m{i}{end}" for i in (1, 2, 3, 4) for end in ("", "_e450")}


@pytest.mark.parametrize(
    ("name", "weight_decay", "drop_path"),
    [
        ("vmamba_tiny", 0.05, 0.2),
        ("vmamba_small", 0.05, 0.3),
        ("vmamba_base", 0.05, 0.6),
        ("vmamba_base_s1l20", 0.05, 0.5),
        ("vim_tiny", 0.1, 0.0),
        ("vim_small", 0.05, 0.05),
        ("vim_tiny_plus", 1e-8, 0.0),
        ("efficientvim_m4", 0.05, 0.0),
        ("shvit_s1", 0.025, 0.0),
        ("shvit_s2", 0.032, 0.0),
        ("shvit_s3", 0.035, 0.0),
        ("shvit_s4_dist", 0.03, 0.0),
        ("shvit_s4_512", 1e-8, 0.0),
        ("efficientmod_xs", 0.05, 0.0),
        ("efficientmod_s_conv", 0.05, 0.02),
    ],
)
def test_decay_and_drop_path_are_the_published_ones(name: str, weight_decay: float, drop_path: float) -> None:
    task = settings(f"classification/{name}")
    assert task["weight_decay"] == weight_decay
    assert (task.get("model_args") or {}).get("drop_path_rate", 0.0) == drop_path


def test_every_published_score_has_a_recipe_and_agrees_with_the_model_list() -> None:
    assert set(NAMES) == {name for name in list_recipes() if name.startswith("classification/")}
    for entry in PUBLISHED:
        published = get_record(entry.model).published.top1
        if f"classification/{entry.model}" == entry.recipe and entry.model not in (
            # Listed with the score of the released, distilled weights.
            "efficientmod_xxs",
            "efficientmod_xs",
            "efficientmod_s",
        ):
            assert entry.top1 == published, entry.recipe


# Parameter name endings, by family, that the official rule decays or exempts.
DECAYED = {
    "vmamba": ("ssm.A_log", "ssm.dt_bias"),
    "vim": ("ahead.A_log", "back.A_log"),
    "efficientvim": ("norm.0.weight", "norm.3.weight", "alpha"),
    "shvit": ("stem.0.conv.weight", "head.fc.weight"),
    "efficientmod": ("stem.conv.weight", "head.weight"),
}
SPARED = {
    "vmamba": ("ssm.D", "norm.weight"),
    "vim": ("ahead.D", "back.D", "norm.weight", "cls_token", "pos_embed"),
    "efficientvim": ("mixer.A", "mixer.D", "head.weights"),
    "shvit": ("norm.weight",),
    "efficientmod": ("gamma", "norm.weight"),
}


def decay_by_name(model: nn.Module, weight_decay: float) -> dict[str, float]:
    optimizer = create_optimizer(model, "adamw", lr=1e-3, weight_decay=weight_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", NAMES)
def test_decayed_are_the_parameters_of_the_official_rule(name: str) -> None:
    task = settings(name)
    with torch.device("meta"):
        model = get_record(task["model"]).create()
    groups = decay_by_name(model, task["weight_decay"])
    shapes = {key: parameter.dim() for key, parameter in model.named_parameters()}
    assert groups.keys() == shapes.keys()
    exempt = {"cls_token", "pos_embed"} if family(name) == "vim" else set()
    for key, decay in groups.items():
        decayed = shapes[key] > 1 and not key.endswith(".bias") and key not in exempt
        assert decay == (task["weight_decay"] if decayed else 0.0), key


@pytest.mark.parametrize("name", NAMES)
def test_parameters_on_the_edge_of_the_rule_are_decayed_as_published(name: str) -> None:
    task = settings(name)
    with torch.device("meta"):
        groups = decay_by_name(get_record(task["model"]).create(), task["weight_decay"])
    for table, expected in ((DECAYED, task["weight_decay"]), (SPARED, 0.0)):
        for ending in table[family(name)]:
            found = [key for key in groups if key.endswith(ending)]
            assert found, ending
            assert {groups[key] for key in found} == {expected}, ending


@pytest.mark.parametrize(("name", "figure"), SMALL.items())
def test_decayed_are_as_many_numbers_as_by_the_official_rule(name: str, figure: str) -> None:
    layout = read_figure(figure)["checkpoint"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    spared = {"cls_token", "pos_embed"}
    expected = sum(
        math.prod(shape)
        for key, shape in layout.items()
        if len(shape) > 1 and not key.endswith((".bias", *buffers)) and key not in spared
    )
    with torch.device("meta"):
        model = get_record(name).create()
    groups = decay_by_name(model, 0.05)
    assert sum(model.get_parameter(key).numel() for key, decay in groups.items() if decay) == expected


def no_teacher(_: str, num_classes: int, **__: Any) -> Any:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)), (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )


LARGE = [name for name in NAMES if settings(name)["model"].removesuffix("_dist") not in SMALL]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in NAMES],
)
def test_command_line_takes_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A real run downloads a teacher of 330 MB.
    monkeypatch.setattr(distillation, "create_teacher", no_teacher)
    root = tmp_path / "imagenet"
    for split in ("train", "val"):
        write_folder(root / split, count=1)
        for i, folder in enumerate(sorted((root / split).iterdir())):
            folder.rename(root / split / f"n0144076{i}")
    flags = [f"--data.init_args.root={root}", "--data.init_args.num_workers=0"]
    flags += ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    if "checkpoint" in settings(name):
        flags.append("--model.init_args.checkpoint=null")
    if read(name)["trainer"]["precision"] == "16-mixed":
        flags.append("--trainer.precision=32-true")
    with filter_lightning_logs():
        cli = TrainCLI(["--config", str(find_recipe(name)), "--folder", str(tmp_path / "run"), *flags])
    assert cli.model.model_name == settings(name)["model"]
    images, _, _ = next(iter(cli.datamodule.val_dataloader()))
    assert images.shape[2] == read(name)["data"]["init_args"]["image_size"]


def test_teacher_with_other_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a teacher with the 3 classes of the data"):
        ClassificationTask("shvit_s1_dist", 3, teacher={"teacher": "regnety_160.deit_in1k"})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "figure_name"), SMALL.items())
def test_first_step_has_the_official_loss_and_fifty_steps_lower_it(
    name: str, figure_name: str, tmp_path: Path
) -> None:
    figure, recipe = read_figure(figure_name), read(f"classification/{name}")
    training, arguments = figure["training"], recipe["model"]["init_args"]
    images, layout = figure_images(training), figure["checkpoint"]
    model_args = {"drop_path_rate": 0.0}
    if name == "vim_tiny":
        layout, model_args = layout | {"pos_embed": training["pos_embed_shape"]}, {"img_size": 64}
    path = write_official_file(tmp_path / "official.pth", fill_checkpoint(layout, figure.get("gain", 1.0)))
    task = ClassificationTask(
        name,
        1000,
        model_args=model_args,
        checkpoint=path,
        lr=arguments["lr"],
        weight_decay=arguments["weight_decay"],
        schedule=CosineSchedule(**arguments["schedule"]),
        agc=arguments.get("agc"),
    ).double()
    targets = torch.tensor(training.get("targets", [0, 1]))
    optimizer = create_optimizer(task.model, "adamw", lr=task.lr, weight_decay=task.weight_decay)
    losses = []
    for step in range(50):
        loss = task.training_loss(images, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if task.agc is not None:
            task.configure_gradient_clipping(optimizer)
        elif clip := recipe["trainer"].get("gradient_clip_val"):
            nn.utils.clip_grad_norm_(task.parameters(), clip)
        rate = task.schedule.rate(step, lr=task.lr, steps_per_epoch=10, total_batch=batch_of(recipe))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert losses[0] == pytest.approx(training["loss"], rel=1e-8)
    assert losses[4] != losses[0]
    assert losses[-1] < losses[0]
