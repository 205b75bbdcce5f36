"""Deprecated names in recipes, flags and imports still work, with a warning."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightspine.recipes import find_recipe, list_recipes
from lightspine.recipes.deprecated import upgrade_flags, upgrade_recipe
from lightspine.training.classification import ClassificationTask
from lightspine.training.cli import TrainCLI
from lightspine.training.fit import TrainResult
from lightspine.training.log_filters import filter_lightning_logs

OLD_TASK = "lightspine.tasks.classification.ClassificationTask"
NEW_TASK = "lightspine.training.classification.ClassificationTask"
OLD_RECIPE = {
    "model": {
        "class_path": OLD_TASK,
        "init_args": {"model": "test_resnet", "ema_decay": 0.9, "publish": "raw"},
    },
    "data": {"class_path": "lightspine.data.modules.DigitsDataModule"},
    "trainer": {"accelerator": "cpu"},
}


def build(folder: Path, *flags: str) -> TrainCLI:
    with filter_lightning_logs():
        return TrainCLI([*upgrade_flags(flags), "--folder", str(folder)])


def test_recipe_of_the_previous_release_builds_the_same_task(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(OLD_RECIPE))
    with pytest.warns(FutureWarning) as warned:
        task = build(tmp_path / "run", "--config", str(tmp_path / "old.yaml")).model
    assert type(task) is ClassificationTask
    assert task.export_weights == "raw"
    messages = [str(warning.message) for warning in warned]
    assert any(f"{OLD_TASK} is deprecated" in text and f"use {NEW_TASK}" in text for text in messages)
    assert any("model.publish is deprecated" in text and "model.export_weights" in text for text in messages)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--model.publish=raw"], ["--model.export_weights=raw"]),
        (["--model.publish", "raw"], ["--model.export_weights", "raw"]),
        (["--model.init_args.publish=raw"], ["--model.init_args.export_weights=raw"]),
        ([f"--model={OLD_TASK}"], [f"--model={NEW_TASK}"]),
        (["--model.class_path", OLD_TASK], ["--model.class_path", NEW_TASK]),
    ],
)
def test_old_flag_becomes_the_new_one_with_a_warning(old: list[str], new: list[str]) -> None:
    with pytest.warns(FutureWarning, match="is deprecated and will be removed in the next release: use"):
        assert upgrade_flags(old) == new


def test_old_flag_sets_the_new_option(tmp_path: Path) -> None:
    flags = ["--model.model=test_resnet", "--data=DigitsDataModule", "--trainer.accelerator=cpu"]
    with pytest.warns(FutureWarning, match=r"model\.export_weights"):
        task = build(tmp_path / "run", *flags, "--model.ema_decay=0.9", "--model.publish=raw").model
    assert task.export_weights == "raw"


def test_current_names_are_left_as_they_are() -> None:
    recipe: dict[str, Any] = {"model": {"class_path": NEW_TASK, "init_args": {"export_weights": "ema"}}}
    flags = ["--model.model_args={publish: 1}", "--data.root=lightspine", "--model.publisher=a"]
    assert upgrade_recipe(recipe) == recipe
    assert upgrade_flags(flags) == flags


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipe_has_current_names_only(name: str) -> None:
    recipe = yaml.safe_load(find_recipe(name).read_text())
    assert upgrade_recipe(recipe) == recipe


def test_package_of_the_previous_release_is_the_current_one() -> None:
    sys.modules.pop("lightspine.tasks", None)
    with pytest.warns(FutureWarning, match="use lightspine.training"):
        old = importlib.import_module("lightspine.tasks")
    assert importlib.import_module("lightspine.tasks.classification").ClassificationTask is ClassificationTask
    assert old.results.TrainResult is TrainResult
