"""What a comparison trains, and on which images: one run per model, from shared settings or from recipes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from lightspine.compare.names import check_model_names
from lightspine.data.digits import export_digits
from lightspine.data.image_folder import VAL_SPLITS, scan_image_folder
from lightspine.data.modules import DigitsDataModule, ImageDataModule, ImageFolderDataModule
from lightspine.data.transforms import AugmentationName
from lightspine.errors import LightspineError
from lightspine.models import find_record
from lightspine.training.classification import ClassificationTask
from lightspine.training.cli import train_recipe
from lightspine.training.fit import TrainResult, train
from lightspine.utils.image_files import open_image

DIGITS = "digits"


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """How every model of a comparison is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        size: height and width of the images in pixels, at least 32.
        lr: highest learning rate.
        augmentation: "none", "light", "medium" or "strong"; the digits have their own.
        val_fraction: share of every class that is held out where the folder has no `val`.
        num_workers: processes that read images.
        seed: of weights, order, augmentation and split.
        accelerator: "cpu", "gpu", "mps" or "auto".
    """

    epochs: int = 10
    batch_size: int = 32
    size: int = 96
    lr: float = 1e-3
    augmentation: AugmentationName = "medium"
    val_fraction: float = 0.2
    num_workers: int = 2
    seed: int = 0
    accelerator: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """One model of a comparison.

    Attributes:
        name: the model's name, also of its files.
        train: trains into a folder, with live progress or without.
    """

    name: str
    train: Callable[[Path, bool], TrainResult]


@dataclass(frozen=True, kw_only=True)
class HeldOutImage:
    """An image file of the held-out split and its true class."""

    path: Path
    label: str


@dataclass(frozen=True, kw_only=True)
class CompareData:
    """The held-out images of a comparison.

    Attributes:
        source: "digits" or a folder of images (see `scan_image_folder`).
        val_fraction: share of every class that is held out; `None` where the data has a split of its own.
        seed: of the held-out share.
        size: side in pixels of the digits that are written as files.
    """

    source: str | Path
    val_fraction: float | None
    seed: int
    size: int

    @property
    def name(self) -> str:
        """What titles and results call the data."""
        return DIGITS if self.source == DIGITS else Path(self.source).resolve().name

    def held_out_images(self, folder: Path, *, count: int) -> list[HeldOutImage]:
        """Return a few readable held-out images, drawn at random; of the digits, the classes in turn.

        Args:
            folder: where digits are written as files; not used for a folder of images.
            count: how many at most.
        """
        if self.source == DIGITS:
            files = export_digits(folder, count=count, image_size=self.size)
            return [HeldOutImage(path=path, label=label) for path, label in files]
        splits = scan_image_folder(self.source, val_fraction=self.val_fraction or 0.2, seed=self.seed)
        samples = list(splits.val)
        random.Random(self.seed).shuffle(samples)
        found: list[HeldOutImage] = []
        for sample in samples:
            if len(found) == count:
                break
            if _is_readable(sample.path):
                found.append(HeldOutImage(path=sample.path, label=splits.class_names[sample.label]))
        return found


def data_of_settings(source: str | Path, settings: CompareSettings) -> CompareData:
    """Return the held-out images that `runs_of_models` with the same settings does not train on."""
    has_split = source == DIGITS or any((Path(source) / name).is_dir() for name in VAL_SPLITS)
    return CompareData(
        source=source,
        val_fraction=None if has_split else settings.val_fraction,
        seed=settings.seed,
        size=settings.size,
    )


def runs_of_models(names: Sequence[str], source: str | Path, settings: CompareSettings) -> list[ModelRun]:
    """Return one run per model, all with the same settings.

    Args:
        names: models of ours or of timm.
        source: a folder of images (see `scan_image_folder`), or "digits".
        settings: how to train.

    Raises:
        UsageError: an unknown model name, or a folder or size that cannot be used.
    """
    check_model_names(names)
    _create_data(source, settings)

    def run_of(name: str) -> ModelRun:
        return ModelRun(
            name=name, train=lambda folder, progress: _train(name, source, settings, folder, progress)
        )

    return [run_of(name) for name in names]


def runs_of_recipes(recipes: Sequence[str], overrides: Sequence[str] = ()) -> list[ModelRun]:
    """Return one run per shipped digits recipe, named after its model.

    Args:
        recipes: names such as `digits_shvit_s1`.
        overrides: flags of `lightspine train` over all of them.
    """

    def run_of(recipe: str) -> ModelRun:
        return ModelRun(
            name=recipe.removeprefix("digits_"),
            train=lambda folder, progress: train_recipe(
                recipe, folder=folder, overrides=overrides, progress=progress
            ),
        )

    return [run_of(recipe) for recipe in recipes]


def _is_readable(path: Path) -> bool:
    try:
        open_image(path)
    except LightspineError:
        return False
    return True


def _create_data(source: str | Path, settings: CompareSettings) -> ImageDataModule:
    if source == DIGITS:
        return DigitsDataModule(image_size=settings.size, batch_size=settings.batch_size, seed=settings.seed)
    return ImageFolderDataModule(
        source,
        image_size=settings.size,
        batch_size=settings.batch_size,
        augmentation=settings.augmentation,
        val_fraction=settings.val_fraction,
        num_workers=settings.num_workers,
        seed=settings.seed,
    )


def _train(
    name: str, source: str | Path, settings: CompareSettings, folder: Path, progress: bool
) -> TrainResult:
    images = _create_data(source, settings)
    task = ClassificationTask(
        name,
        images.num_classes,
        model_args=_size_arguments(name, settings.size),
        lr=settings.lr,
        # A run of an epoch or two must reach its learning rate too.
        warmup_epochs=min(1.0, settings.epochs / 4),
        seed=settings.seed,
    )
    return train(
        task,
        images,
        folder=folder,
        epochs=settings.epochs,
        gradient_clip=1.0,
        accelerator=settings.accelerator,
        progress=progress,
    )


def _size_arguments(name: str, size: int) -> dict[str, Any]:
    # Some of timm's models are built for one size and have to be told another; ours take any.
    cfg = None if find_record(name) else timm.get_pretrained_cfg(name)
    return {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}
