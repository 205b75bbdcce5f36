"""Short forms of the most common flags of `lightspine train`, and suggestions for unknown flags."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from lightspine.errors import UsageError
from lightspine.recipes import find_recipe
from lightspine.training.class_paths import read_recipe

_FLAGS = {
    "epochs": (int, "an integer"),
    "lr": (float, "a number"),
    "batch-size": (int, "an integer"),
    "size": (int, "an integer"),
}
"""Short flag -> type of its value and its name in messages."""

# Names that other training programs use -> flag of this one.
_KNOWN_ELSEWHERE = {
    "bs": "--batch-size",
    "checkpoint": "--model.checkpoint",
    "data": "--data.root",
    "data-dir": "--data.root",
    "device": "--trainer.accelerator",
    "devices": "--trainer.devices",
    "gpus": "--trainer.devices",
    "image-size": "--size",
    "img-size": "--size",
    "imgsz": "--size",
    "iters": "--trainer.max_steps",
    "learning-rate": "--lr",
    "max-epochs": "--epochs",
    "max-steps": "--trainer.max_steps",
    "model-name": "--model.model",
    "name": "--folder",
    "num-epochs": "--epochs",
    "num-workers": "--data.num_workers",
    "opt": "--model.optimizer",
    "optimizer": "--model.optimizer",
    "out": "--folder",
    "output": "--folder",
    "output-dir": "--folder",
    "precision": "--trainer.precision",
    "pretrained": "--model.checkpoint",
    "recipe": "--config",
    "root": "--data.root",
    "weight-decay": "--model.weight_decay",
    "weights": "--model.checkpoint",
    "workers": "--data.num_workers",
}


def expand_short_flags(args: Sequence[str]) -> list[str]:
    """Replace `--epochs`, `--lr`, `--batch-size` and `--size` by the options that they stand for.

    `--size N` is the height and width of images for a classifier, the shorter side of images for a detector
    (the longer side is at most 5/3 N, the ratio of COCO's usual 800 and 1333) and for a segmenter (at most
    4 N, as in ADE20K's recipes), which trains on crops of N x N.

    Args:
        args: arguments of `lightspine train`.

    Raises:
        UsageError: a value is missing or is not a positive number.
    """
    expanded: list[str] = []
    position = 0
    while position < len(args):
        name, equals, value = args[position].partition("=")
        position += 1
        short = name.removeprefix("--").replace("_", "-")
        if not name.startswith("--") or short not in _FLAGS:
            expanded.append(args[position - 1])
            continue
        if not equals:
            value = args[position] if position < len(args) else ""
            position += 1
        expanded += _LONG_FLAGS[short](_parse(short, value), args)
    return expanded


def suggest_flag(name: str) -> str | None:
    """Return the flag that is probably meant by an unknown one, or None.

    Args:
        name: the unknown flag, such as "--learning_rate".
    """
    key = re.sub("[._]", "-", name.lstrip("-"))
    if key in _KNOWN_ELSEWHERE:
        return _KNOWN_ELSEWHERE[key]
    known = [*_FLAGS, *_KNOWN_ELSEWHERE]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return _KNOWN_ELSEWHERE.get(close[0], f"--{close[0]}") if close else None


def _parse(name: str, text: str) -> Any:
    kind, what = _FLAGS[name]
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not 0 < value < float("inf"):
        raise UsageError(f"expected --{name} with {what} above 0, got {text!r}")
    return value


def _size_flags(size: int, args: Sequence[str]) -> list[str]:
    task = _find_task(args)
    if task == "DetectionTask":
        values = {"shorter": str(size), "longest": str(round(size * 5 / 3))}
    elif task == "SegmentationTask":
        values = {"crop": f"[{size}, {size}]", "scale": f"[{size}, {4 * size}]"}
    else:
        values = {"image_size": str(size)}
    return [f"--data.init_args.{key}={value}" for key, value in values.items()]


_LONG_FLAGS: dict[str, Callable[[Any, Sequence[str]], list[str]]] = {
    "epochs": lambda value, _: [f"--trainer.max_epochs={value}"],
    "lr": lambda value, _: [f"--model.init_args.lr={value}"],
    "batch-size": lambda value, _: [f"--data.init_args.batch_size={value}"],
    "size": _size_flags,
}


def _find_task(args: Sequence[str]) -> str:
    """Return the class name of the task that the recipe or a flag selects."""
    task = "ClassificationTask"
    for flag, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        value = value if equals else following
        if name in ("--config", "-c"):
            recipe = read_recipe(find_recipe(value))
            model = recipe.get("model") if isinstance(recipe, dict) else None
            task = (model or {}).get("class_path", task) if isinstance(model, dict) else model or task
        elif name in ("--model", "--model.class_path"):
            task = value
    return task.rpartition(".")[2]
