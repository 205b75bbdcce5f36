"""Training recipes of the package. A recipe is a YAML file that configures a complete run.

`classification/`, `detection/` and `segmentation/` have one recipe for each published result. The other
recipes train on small data or fine-tune. `published.csv` has the published scores. There is no recipe for
Vim-base, because its training script was not published.
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
"""The score columns of `published.csv`."""

_FOLDER = Path(__file__).parent
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, kw_only=True)
class PublishedRecipe:
    """Published scores of the run that a recipe reproduces; a score that is not published is None.

    Attributes:
        recipe: name of the recipe.
        model: name of the model.
        data: training data.
        top1: top-1 accuracy in percent.
        box_ap: box AP of a detector in percent.
        mask_ap: mask AP of a detector in percent.
        miou: single-scale mIoU of a segmenter in percent.
        miou_ms: mIoU with multi-scale and flip testing in percent.
        note: conditions of the scores, such as distillation or the epoch.
        source: where the scores are published.
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


@dataclass(frozen=True, kw_only=True)
class RecipeSummary:
    """Main settings of a recipe.

    Attributes:
        name: name for `lightspine train --config`.
        description: what the recipe trains, in one sentence.
        model: name of the model.
        task: task, such as "classification".
        data: training data.
        batch_size: total batch size over all devices.
        epochs: length of the run in epochs, or an upper limit if the run is measured in steps.
        steps: length of the run in optimizer steps, if it is measured in steps.
        published: published scores of the run, if it reproduces one.
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


def list_recipes() -> list[str]:
    """Return the sorted names of the shipped recipes: `classification/vim_tiny`, `digits_vim_tiny`, ..."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def list_published() -> list[PublishedRecipe]:
    """Return the published scores of all recipes that reproduce a run, in the order of the papers."""
    with (_FOLDER / "published.csv").open(newline="") as file:
        return [
            PublishedRecipe(**row | {key: float(row[key]) if row[key] else None for key in SCORES})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]


def find_recipe(name: str | Path) -> Path:
    """Return the path of a recipe.

    Args:
        name: name of a shipped recipe, such as `digits_vim_tiny` or `classification/vim_tiny`, or the path of
            a file.

    Raises:
        UsageError: there is no such recipe or file.
    """
    if Path(name).is_file():
        return Path(name)
    names = list_recipes()
    if str(name) not in names:
        # Suggest `classification/vim_tiny` for `vim_tiny`.
        close = [known for known in names if known.rpartition("/")[2] == str(name)]
        close = close or difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(
            f"expected a file or the name of a recipe, got {str(name)!r}: {hint}"
            "`lightspine recipes` lists them"
        )
    return _FOLDER / f"{name}.yaml"


def recipe_name(path: str | Path) -> str:
    """Return the name of a shipped recipe, or the file name of another one, without suffix."""
    path = Path(path).resolve()
    inside = path.is_relative_to(_FOLDER.resolve())
    return path.relative_to(_FOLDER.resolve()).with_suffix("").as_posix() if inside else path.stem


def describe_recipe(name: str) -> str:
    """Return the first line of a recipe, which describes it in one sentence."""
    first = find_recipe(name).read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip()


def summarize_recipe(name: str) -> RecipeSummary:
    """Read the main settings of a shipped recipe.

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
        task=_class_words(task["class_path"], "Task"),
        data=published.data if published else _data_name(data["class_path"]),
        batch_size=data["init_args"]["batch_size"] * trainer.get("devices", 1),
        epochs=trainer["max_epochs"],
        steps=trainer.get("max_steps"),
        published=published,
    )


def _data_name(class_path: str) -> str:
    # The task has its own column, so "segmentation folder" becomes "folder".
    words = _class_words(class_path, "DataModule").split()
    return " ".join(word for word in words if word not in ("segmentation", "semantic"))


def _class_words(class_path: str, suffix: str) -> str:
    """Split a class name into words: "ImageFolderDataModule" without "DataModule" is "image folder"."""
    name = class_path.rpartition(".")[2].removesuffix(suffix)
    return _CAPITAL.sub(" ", name).lower()
