"""What a recipe is about, read from its file without building anything."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from lightspine.recipes import PublishedRecipe, describe_recipe, find_recipe, list_published

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
