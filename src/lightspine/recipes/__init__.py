"""Complete training configurations that ship with the package: one YAML file is one run.

`classification/`, `detection/` and `segmentation/` have one recipe for each published row; the others finish
on a laptop or start from weights. What the papers print for a recipe stands in `published.csv`. Vim-base has
no recipe: the script of its training was not published.
"""

import csv
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightspine.errors import UsageError

SCORES = ("top1", "box_ap", "mask_ap", "miou", "miou_ms")
"""The columns of `published.csv` that hold a score."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class PublishedRecipe:
    """What is printed about the run that a recipe repeats.

    Attributes:
        recipe: name of the recipe.
        model: name of the model.
        data: what it is trained on.
        top1: accuracy in percent; None where none is printed, as all scores.
        box_ap: average precision of a detector's boxes in percent.
        mask_ap: of its masks.
        miou: mean intersection over union of a segmenter in percent.
        miou_ms: the same tested at several sizes and mirrored.
        note: what the number stands for where it is not plain training.
        source: where it is printed.
    """

    recipe: str
    model: str
    data: str
    top1: float | None
    box_ap: float | None
    mask_ap: float | None
    miou: float | None
    miou_ms: float | None
    note: str
    source: str


def list_recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted: `classification/vim_tiny`, `digits_vim_tiny`, ..."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def list_published() -> list[PublishedRecipe]:
    """Return the recipes that repeat a published run, in the order of the families' papers."""
    with (_FOLDER / "published.csv").open(newline="") as file:
        return [
            PublishedRecipe(**row | {key: float(row[key]) if row[key] else None for key in SCORES})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]


def describe_recipe(name: str) -> str:
    """Return the first line of a recipe: what it does, in a sentence."""
    first = find_recipe(name).read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip()


def find_recipe(name: str | Path) -> Path:
    """Return the file of a shipped recipe, or the path itself where it is a file.

    Args:
        name: such as `digits_vim_tiny` or `classification/vim_tiny`, or a path.

    Raises:
        UsageError: neither a recipe nor a file.
    """
    if Path(name).is_file():
        return Path(name)
    names = list_recipes()
    if str(name) not in names:
        # `vim_tiny` is close to `classification/vim_tiny` by its last part only.
        close = [known for known in names if known.rpartition("/")[2] == str(name)]
        close = close or difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(
            f"expected a file or the name of a recipe, got {str(name)!r}: {hint}"
            "`lightspine recipes` lists them"
        )
    return _FOLDER / f"{name}.yaml"


_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, kw_only=True)
class RecipeSummary:
    """A shipped recipe in a line.

    Attributes:
        name: what `lightspine train --config` takes.
        description: what it does, in a sentence.
        model: name of the model.
        task: such as "classification".
        data: what it is trained on.
        batch_size: images per step over all devices of the recipe.
        epochs: length of the run, or a bound of it where it is counted in steps.
        steps: length of the run in steps of the optimiser, where it is counted in them.
        published: what is printed about the run that it repeats, if it repeats one.
    """

    name: str
    description: str
    model: str
    task: str
    data: str
    batch_size: int
    epochs: int
    steps: int | None
    published: PublishedRecipe | None


def summarize_recipe(name: str) -> RecipeSummary:
    """Read a shipped recipe.

    Raises:
        UsageError: there is no recipe of that name.
    """
    recipe: dict[str, Any] = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
    task, data, trainer = recipe["model"], recipe["data"], recipe["trainer"]
    published = next((entry for entry in list_published() if entry.recipe == name), None)
    return RecipeSummary(
        name=name,
        description=describe_recipe(name),
        model=task["init_args"]["model"],
        task=_words(task["class_path"], "Task"),
        data=published.data if published else _data_of(data["class_path"]),
        batch_size=data["init_args"]["batch_size"] * trainer.get("devices", 1),
        epochs=trainer["max_epochs"],
        steps=trainer.get("max_steps"),
        published=published,
    )


def _data_of(class_path: str) -> str:
    # What the task says already is left out: "segmentation folder" is "folder", "coco semantic" is "coco".
    words = _words(class_path, "DataModule").split()
    return " ".join(word for word in words if word not in ("segmentation", "semantic"))


def _words(class_path: str, ending: str) -> str:
    name = class_path.rpartition(".")[2].removesuffix(ending)
    return _CAPITAL.sub(" ", name).lower()
