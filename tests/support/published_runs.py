"""The published training runs: their inputs, and a recorder of what is compared at every step.

The files in `fixtures/reference/training/` have values of the official training code in float64, from weights
and images that `support.fill` rebuilds. Drop path, augmentation and mixing are off.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import Checkpoint
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightspine.data import Preprocessing
from lightspine.data.dataset import Batch
from lightspine.data.modules import ImageDataModule
from lightspine.models import get_record
from lightspine.recipes import find_recipe
from lightspine.training.cli import TrainCLI
from lightspine.training.log_filters import filter_lightning_logs
from support.fill import fill_tensor, make_images
from support.reference import fill_checkpoint, read_figure, write_official_file

CLASSES = 1000
_TEACHER = "pooled_linear_teacher"


class PooledLinear(nn.Module):
    """Teacher of the published runs: a linear map of the 4 x 4 px average of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.pretrained_cfg: dict[str, Any] = {}
        weight = fill_tensor("teacher.weight", (CLASSES, 48), gain=32.0)
        self.weight = nn.Parameter(torch.from_numpy(weight))

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight.T


def pooled_linear_teacher(pretrained: bool = False, **_: Any) -> nn.Module:
    """Return the teacher; its weights are always the same."""
    assert not pretrained
    return PooledLinear()


if not timm.is_model(_TEACHER):
    register_model(pooled_linear_teacher)


class RebuiltImages(Dataset[tuple[Tensor, Tensor]]):
    """One batch of images and class probabilities per step; no batch comes twice."""

    def __init__(self, figure: dict[str, Any]) -> None:
        self.figure = figure

    def __len__(self) -> int:
        return self.figure["steps"]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        size, batch = self.figure["image_size"], self.figure["batch"]
        images = torch.from_numpy(make_images(batch, size, size, seed=1000 + step)).double()
        rows = torch.arange(batch)
        share = 0.3 + 0.05 * (step % 9)
        first, second = (7 * rows + 13 * step) % CLASSES, (11 * rows + 29 * step + 5) % CLASSES
        return images, share * _smoothed(first) + (1 - share) * _smoothed(second)


def _smoothed(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).double() * (1 - 0.1) + 0.1 / CLASSES


class RebuiltData(ImageDataModule):
    """Data module of a published run.

    Args:
        run: name of the file in `fixtures/reference/training/`.
        nominal_batch: total batch size of the recipe, with which the learning rate is scaled.
        seed: not used, because the images are the same for every seed.
    """

    def __init__(self, run: str, nominal_batch: int, seed: int = 0) -> None:
        self.figure = read_figure(f"training/{run}")
        size = self.figure["image_size"]
        names = [str(i) for i in range(CLASSES)]
        super().__init__(names, Preprocessing(input_size=(3, size, size)), nominal_batch, 0, seed)

    def train_dataloader(self) -> Any:
        """Return the batches of the current epoch."""
        each = self.figure["steps_per_epoch"]
        first = self.trainer.current_epoch * each
        images = RebuiltImages(self.figure)
        return DataLoader(Subset(images, range(first, first + each)), batch_size=None, collate_fn=_batch)

    def val_dataloader(self) -> Any:
        """Return one batch."""
        return DataLoader(Subset(RebuiltImages(self.figure), [0]), batch_size=None, collate_fn=_val_batch)


def _batch(item: tuple[Tensor, Tensor]) -> Batch:
    return Batch(*item, [])


def _val_batch(item: tuple[Tensor, Tensor]) -> Batch:
    return Batch(item[0], item[1].argmax(1), [])


class StepRecorder(Checkpoint):
    """Records loss, gradient norms, learning rate and the weights at every step.

    A checkpoint callback, because Lightning calls these after the average is updated.
    """

    def __init__(self, after: set[int], entries: list[tuple[str, int]]) -> None:
        self.after = after
        self.entries = entries
        names = ("loss", "norm_before", "norm_after", "lr", "weight_norm", "ema_norm")
        self.steps: dict[str, list[float]] = {name: [] for name in names}
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.initial: dict[str, Any] = {}

    def on_train_start(self, _: pl.Trainer, task: Any) -> None:
        self.initial = self._snapshot(task.model)

    def on_before_optimizer_step(self, _: pl.Trainer, task: Any, optimizer: Any) -> None:
        self.steps["norm_before"].append(_gradient_norm(task.model))
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.steps["lr"].append(rate)

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, *_: Any) -> None:
        average = task.ema_model()
        self.steps["loss"].append(float(outputs["loss"]))
        self.steps["norm_after"].append(_gradient_norm(task.model))
        self.steps["weight_norm"].append(_parameter_norm(task.model))
        self.steps["ema_norm"].append(_parameter_norm(average))
        if trainer.global_step in self.after:
            trained, averaged = self._snapshot(task.model), self._snapshot(average)
            self.snapshots[str(trainer.global_step)] = {
                **trained,
                "ema": averaged["weights"],
                "ema_norm": averaged["weight_norm"],
                "ema_buffer_norm": averaged["buffer_norm"],
            }

    def _snapshot(self, model: nn.Module) -> dict[str, Any]:
        tensors = model.state_dict()
        return {
            "weights": [tensors[key].flatten()[index].item() for key, index in self.entries],
            "weight_norm": _parameter_norm(model),
            "buffer_norm": _buffer_norm(model),
        }


def create_run(
    run: str, folder: Path, *, recipe: str, steps: int | None = None
) -> tuple[TrainCLI, StepRecorder]:
    """Set up `lightspine train` with a shipped recipe and the data and the length of a published run.

    Args:
        run: name of the file in `fixtures/reference/training/`.
        folder: for the weights and the run.
        recipe: name of the recipe.
        steps: number of steps; by default all.
    """
    figure = read_figure(f"training/{run}")
    layout = read_figure(figure["reference"].removesuffix(".json"))["checkpoint"]
    layout = layout | figure["shapes_that_differ_from_reference"]
    content = yaml.safe_load(find_recipe(recipe).read_text())
    data, task, trainer = content["data"], content["model"]["init_args"], content["trainer"]
    nominal_batch = data["init_args"]["batch_size"] * trainer["devices"]
    content["data"] = {
        "class_path": "support.published_runs.RebuiltData",
        "init_args": {"run": run, "nominal_batch": nominal_batch},
    }
    task |= {
        "checkpoint": str(folder / "official.pth"),
        "mixup": 0.0,
        "cutmix": 0.0,
        "model_args": task.get("model_args", {}) | {"drop_path_rate": 0.0},
    }
    if figure["shapes_that_differ_from_reference"]:
        task["model_args"]["img_size"] = figure["image_size"]
    task["schedule"] |= {"epochs": figure["cosine_epochs"], "warmup_epochs": figure["warmup_epochs"]}
    if "cooldown_epochs" in task["schedule"]:
        task["schedule"]["cooldown_epochs"] = figure["cooldown_epochs"]
    if "teacher" in task:
        task["teacher"] |= {"teacher": _TEACHER, "teacher_args": {"pretrained": False}}
    trainer |= {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
        "max_epochs": figure["cosine_epochs"] + figure["cooldown_epochs"],
        "max_steps": steps or figure["steps"],
        "enable_progress_bar": False,
        "reload_dataloaders_every_n_epochs": 1,
    }
    write_official_file(folder / "official.pth", fill_checkpoint(layout, figure["gain"]))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    with filter_lightning_logs():
        cli = TrainCLI(["--config", str(folder / "recipe.yaml"), "--folder", str(folder / "run")])
    entries = _find_entries(figure["model"], cli.model.model, layout, figure["entries"])
    recorder = StepRecorder({int(step) for step in figure["after"]}, entries)
    cli.trainer.callbacks.append(recorder)
    return cli, recorder


def _find_entries(
    name: str, model: nn.Module, layout: dict[str, list[int]], entries: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Return the places of published entries (key, index in the flattened tensor) in our state dict."""
    marked = {key: torch.zeros(shape) for key, shape in layout.items()}
    for number, (key, index) in enumerate(entries, 1):
        marked[key].view(-1)[index] = number
    renamed = get_record(name).checkpoint_filter_fn(marked, model)
    places = {}
    for key, tensor in renamed.items():
        for index in tensor.flatten().nonzero().flatten().tolist():
            places[int(tensor.flatten()[index])] = (key, index)
    return [places[number] for number in range(1, len(entries) + 1)]


def _gradient_norm(model: nn.Module) -> float:
    return _norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])


def _parameter_norm(model: nn.Module) -> float:
    return _norm(list(model.parameters()))


def _buffer_norm(model: nn.Module) -> float:
    parameters = dict(model.named_parameters())
    tensors = model.state_dict().items()
    return _norm([x for name, x in tensors if name not in parameters and x.is_floating_point()])


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(tensor.detach().double().square().sum() for tensor in tensors)) ** 0.5
