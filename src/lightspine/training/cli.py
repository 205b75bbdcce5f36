"""`lightspine train`: parse a recipe and flags with LightningCLI, then call `run_training`."""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentError, Namespace, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightspine.data import modules
from lightspine.data.modules import ClassificationDataModule, ImageDataModule, SegmentationDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.models.metadata import PREPROCESSING_KEYS, default_preprocessing
from lightspine.models.registry import find_record, find_timm_cfg
from lightspine.recipes import find_recipe, recipe_name
from lightspine.recipes.deprecated import upgrade_flags, upgrade_recipe
from lightspine.training.base import LightspineTask
from lightspine.training.class_paths import (
    limit_class_paths,
    refusal,
    refused_class_path,
)
from lightspine.training.classification import ClassificationTask
from lightspine.training.detection import DetectionTask
from lightspine.training.fit import TRAINER_DEFAULTS, Export, TrainResult, run_callbacks, run_training
from lightspine.training.log_filters import filter_lightning_logs, has_terminal, show_info_logs
from lightspine.training.lr_schedules import CosineSchedule, DecaySchedule, MilestoneSchedule
from lightspine.training.resume import AUTO, prepare_folder
from lightspine.training.segmentation import SegmentationTask
from lightspine.training.short_flags import expand_short_flags, suggest_flag
from lightspine.utils.files import atomic_write_text
from lightspine.utils.rank_monitor import RANK_TIMEOUT_S
from lightspine.utils.yaml_text import check_yaml_text

_LOG = logging.getLogger(__name__)
_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN_FLAG = re.compile(r"(?:[Uu]nrecognized arguments:|Option) '?([\w.-]+)")
_CLASS = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>")
_ABSTRACT = ("ImageDataModule", "SegmentationDataModule", "ClassificationDataModule")
_TASKS = (ClassificationTask, DetectionTask, SegmentationTask)
_SCHEDULES = (CosineSchedule, MilestoneSchedule, DecaySchedule)
_SWITCHES = {
    "grad_checkpointing": "recompute activations in the backward pass (activation checkpointing)",
    "compile": "compile the model with torch.compile",
    "tensorboard": "also log to TensorBoard",
}
# Classes that recipes and flags may name without an import path.
_CLASSES = {
    "data": [name for name in modules.__all__ if name.endswith("DataModule") and name not in _ABSTRACT],
    "model": [task.__name__ for task in _TASKS],
}
# Lines of jsonargparse's messages that do not help a user.
_BOILERPLATE = (
    "Does not validate",
    "Subtypes:",
    "Errors",
    "Problem with given class_path",
    "Expected a <class 'NoneType'>",
    "Expected a <class 'collections.abc.Iterable'>",
    "Given value",
)


def main(args: Sequence[str] | None = None) -> TrainResult:
    """Run `lightspine train` with `--config NAME_OR_PATH` and flags that override it.

    `--epochs`, `--lr`, `--batch-size` and `--size` are short forms, see `expand_short_flags`; `--help-all`
    shows all other options.

    Args:
        args: arguments after `lightspine train`; by default `sys.argv[1:]`.

    Returns:
        The paths and metrics of the run.

    Raises:
        UsageError: a flag or the recipe is invalid.
        LightspineError: see `lightspine.training.fit.train`.
        SystemExit: after `--help-all` or `--print_config`.
    """
    given, trusted = _split_trusted(sys.argv[1:] if args is None else args)
    arguments = _resolve_recipes(expand_short_flags(upgrade_flags(given)))
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    if trusted:
        _LOG.warning("classes of %s may run code that a recipe names", ", ".join(trusted))
    with filter_lightning_logs(), limit_class_paths(trusted):
        try:
            cli = TrainCLI(arguments)
        except ArgumentError as error:
            path = refused_class_path(str(error))
            if path is not None:
                raise refusal(path) from error
            raise UsageError(_one_line(str(error)) + _suggestion(str(error))) from error
        except ValueError as error:
            # jsonargparse wraps errors from the constructors of the task and the data module.
            path = refused_class_path(str(error))
            if path is not None:
                raise refusal(path) from error
            raise _find_lightspine_error(error) or UsageError(_one_line(str(error))) from error
    return cli.train()


def train_recipe(
    recipe: str | Path, *, folder: str | Path, overrides: Sequence[str] = (), progress: bool = True
) -> TrainResult:
    """Train a recipe from Python.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        folder: folder of the run; see `lightspine.training.fit.train`.
        overrides: flags as on the command line, such as "--trainer.max_epochs=3".
        progress: show a progress bar.

    Returns:
        The paths and metrics of the run.

    Raises:
        UsageError: the recipe is unknown or an override is invalid.
        LightspineError: see `lightspine.training.fit.train`.
    """
    bar = [] if progress else ["--trainer.enable_progress_bar=false"]
    return main(["--config", str(recipe), "--folder", str(folder), *bar, *overrides])


def load_recipe(text: str) -> Any:
    """Parse YAML like jsonargparse does, and replace deprecated names.

    jsonargparse also parses the values of flags with it, which need not be mappings.
    """
    check_yaml_text(text, "recipe")
    content = get_loader("yaml")(text)
    return upgrade_recipe(content) if isinstance(content, dict) else content


_RECIPE_MODE = "lightspine_recipe"
set_loader(_RECIPE_MODE, load_recipe, exceptions=(yaml.YAMLError,))


class _SaveConfig(SaveConfigCallback):
    """Writes config.yaml to the folder of the run; the original writes to that of the first logger."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        path = Path(trainer.default_root_dir, self.config_filename)
        atomic_write_text(path, self.parser.dump(self.config, skip_none=False))


class TrainCLI(LightningCLI):
    """LightningCLI of `lightspine train`: parses the arguments and creates trainer, task and data."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            LightspineTask,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={
                "exit_on_error": False,
                "prog": "lightspine train",
                "parser_mode": _RECIPE_MODE,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args),
            run=False,
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer; report an invalid option as UsageError."""
        try:
            return super().instantiate_trainer(**kwargs)
        except LightspineError:
            raise
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UsageError(f"invalid --trainer option: {str(error).strip().splitlines()[0]}") from error

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flags of the run instead of Lightning's `--seed_everything`."""
        parser.add_argument(
            "--seed", type=int, default=0, help="seed of initial weights, image order and augmentation"
        )
        parser.add_argument(
            "--folder", type=str | None, default=None, help="folder of the run, by default runs/MODEL"
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            nargs="?",
            const=AUTO,
            help="path of the last.ckpt to resume from; auto or no value: the one in --folder, if any",
        )
        parser.add_argument(
            "--export",
            type=Export,
            default="best",
            help="epoch whose weights are exported: the one with the best validation score, or the last",
        )
        parser.add_argument(
            "--save-every-steps",
            "--save_every_steps",
            type=int | None,
            default=None,
            help="also write last.ckpt every n steps, not only after every epoch",
        )
        parser.add_argument(
            "--effective-batch",
            "--effective_batch",
            type=int | None,
            default=None,
            help="total batch size per optimizer step over all devices, by gradient accumulation",
        )
        parser.add_argument(
            "--rank-timeout",
            "--rank_timeout",
            type=float,
            default=RANK_TIMEOUT_S,
            help="seconds after which a distributed run ends if a rank does not answer or proceed",
        )
        for name, text in _SWITCHES.items():
            parser.add_argument(
                f"--{name.replace('_', '-')}", f"--{name}", action="store_true", default=False, help=text
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the seed and the number of classes to the task and the data."""
        parser.set_defaults({"model": "ClassificationTask"})
        parser.link_arguments("seed", "model.init_args.seed")
        parser.link_arguments("seed", "data.init_args.seed")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments."""
        # Lightning's method warns if sys.argv has arguments, which is always the case here.
        self.config = parser.parse_args(cast(Sequence[str], args))

    def _set_seed(self) -> None:
        # The task and the data seed themselves.
        pass

    def before_instantiate_classes(self) -> None:
        """Set the preprocessing of the data, create the folder of the run and configure the callbacks."""
        config: Namespace = self.config
        # Set here and not linked: jsonargparse skips links to options without a default in the signature.
        task: type[LightspineTask] = _find_class(config.model.class_path)
        prepared = issubclass(
            _find_class(config.data.class_path), (ClassificationDataModule, SegmentationDataModule)
        )
        if prepared and config.data.init_args.get("preprocessing") is None:
            config.data.init_args.preprocessing = published_preprocessing(config.model.init_args.model)
        parts = (config.model.init_args.get("head"), config.model.init_args.model)
        folder = config.folder or Path("runs", "_".join(part for part in parts if part))
        self.folder = prepare_folder(folder, resume=config.resume)
        config.trainer.default_root_dir = os.fspath(self.folder)
        self.progress = config.trainer.enable_progress_bar is not False
        live = self.progress and has_terminal()
        config.trainer.enable_progress_bar = live
        self.trainer_defaults["callbacks"] = run_callbacks(
            self.folder,
            score=task.score,
            progress=self.progress,
            live=live,
            save_every_steps=config.save_every_steps,
            effective_batch=config.effective_batch,
            rank_timeout=config.rank_timeout,
        )

    def train(self) -> TrainResult:
        """Run the training."""
        switches = {name: self.config[name] for name in _SWITCHES}
        self.model.recipe = self._describe_recipe()
        with show_info_logs() if self.progress else contextlib.nullcontext():
            return run_training(
                self.trainer,
                self.model,
                self.datamodule,
                resume=self.config.resume,
                export=self.config.export,
                **switches,
            )

    def _describe_recipe(self) -> dict[str, Any]:
        """Return the name of the recipe and all settings of the run, except for its folder."""
        config: dict[str, Any] = json.loads(self.parser.dump(self.config, format="json"))
        files = self.config.get("config") or []
        for key in ("config", "folder", "resume"):
            config.pop(key, None)
        config["trainer"].pop("default_root_dir", None)
        names = [recipe_name(str(file)) for file in files]
        return {"recipe": names[-1] if names else None, "config": config}


def published_preprocessing(model: str) -> dict[str, Any]:
    """Return the preprocessing of a model's published weights without allocating the model."""
    record = find_record(model)
    if record is not None:
        with torch.device("meta"):
            found = default_preprocessing(record.create())
    else:
        cfg = find_timm_cfg(model)
        found = {} if cfg is None else cfg.to_dict()
    # Lists instead of tuples, as YAML loads them.
    return {
        key: list(found[key]) if isinstance(found[key], tuple) else found[key]
        for key in PREPROCESSING_KEYS
        if key in found
    }


def _find_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _split_trusted(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without `--trust-class-path`, and the packages that it names."""
    others: list[str] = []
    trusted: list[str] = []
    remaining = list(args)
    while remaining:
        name, equals, value = (argument := remaining.pop(0)).partition("=")
        if name != "--trust-class-path":
            others.append(argument)
        elif equals or remaining:
            trusted.append(value if equals else remaining.pop(0))
        else:
            raise UsageError("--trust-class-path: expected the name of a package")
    return others, trusted


def _resolve_recipes(args: list[str]) -> list[str]:
    """Replace recipe names after `--config` by their paths, and move them before all other flags.

    jsonargparse applies arguments in their order: a recipe would override the flags before it.
    """
    recipes, others = [], []
    position = 0
    while position < len(args):
        name, equals, value = args[position].partition("=")
        position += 1
        if name not in ("--config", "-c") or not (equals or position < len(args)):
            others.append(args[position - 1])
            continue
        if not equals:
            value = args[position]
            position += 1
        recipe = find_recipe(value)
        _check_encoding(recipe)
        recipes.append(f"--config={recipe}")
    return recipes + others


def _check_encoding(recipe: Path) -> None:
    try:
        recipe.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"expected a recipe in UTF-8, but {recipe} is not: {error}") from error
    except OSError as error:
        raise LightspineError(f"cannot read {recipe}: {error.strerror or error}") from error


def _one_line(message: str) -> str:
    """Shorten a jsonargparse message to one line, without the list of types that it tried."""
    key = ".".join(_KEY.findall(message))
    lines = [_KEY.sub("", line).strip(" -:\n") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_BOILERPLATE)]
    if key in _CLASSES and any("dot import path" in line for line in kept):
        value = kept[-1].rpartition(": ")[2]
        known = ", ".join(_CLASSES[key])
        return f"expected --{key} with {known} or the import path of a class, got {value!r}"
    if key == "model.schedule":
        # jsonargparse lists the errors of every schedule class, but not their names.
        known = "; ".join(f"{kind.__name__} ({', '.join(_field_names(kind))})" for kind in _SCHEDULES)
        return f"invalid argument {key}: expected the fields of one of {known}"
    text = _CLASS.sub(r"\1", "; ".join(kept[:2])).replace("typing.", "")
    return f"invalid argument {key}: {text}" if key else text


def _suggestion(message: str) -> str:
    """Return the flag that is probably meant by an unknown one, as an addition to jsonargparse's message."""
    unknown = _UNKNOWN_FLAG.search(message)
    flag = suggest_flag(unknown[1]) if unknown else None
    return f"; did you mean {flag}? `lightspine train --help` lists the common options" if flag else ""


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _find_lightspine_error(error: BaseException | None) -> LightspineError | None:
    while error is not None and not isinstance(error, LightspineError):
        error = error.__cause__ or error.__context__
    return error
