"""Training runs and held-out images of a comparison, from shared settings or from recipes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightspine.compare import check_model_names
from lightspine.data.digits import export_digits
from lightspine.data.image_folder import scan_image_folder
from lightspine.data.modules import DigitsDataModule, ImageDataModule, ImageFolderDataModule
from lightspine.data.split_names import VAL_SPLITS, find_split_folder
from lightspine.data.transforms import AugmentationName
from lightspine.errors import LightspineError
from lightspine.models.loading import fetch_published, is_published
from lightspine.models.registry import find_timm_cfg
from lightspine.training.classification import ClassificationTask
from lightspine.training.cli import train_recipe
from lightspine.training.fit import TrainResult, train
from lightspine.utils.image_files import open_image

DIGITS = "digits"


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Training settings that all models of a comparison share.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        size: height and width of the images in pixels, at least 32.
        lr: peak learning rate.
        augmentation: "none", "light", "medium" or "strong"; not used for the digits.
        val_fraction: fraction of each class that is held out if the folder has no `val`.
        num_workers: data loading processes.
        seed: random seed of weights, order, augmentation and split.
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
    """One training run of a comparison.

    Attributes:
        name: model name, also the stem of its files.
        train: function of (folder, progress) that runs the training.
    """

    name: str
    train: Callable[[Path, bool], TrainResult]


@dataclass(frozen=True, kw_only=True)
class HeldOutImage:
    """A held-out image file and its true class."""

    path: Path
    label: str


@dataclass(frozen=True, kw_only=True)
class CompareData:
    """The held-out images of a comparison.

    Attributes:
        source: "digits" or a folder of images (see `scan_image_folder`).
        val_fraction: fraction of each class that is held out; `None` if the data has its own split.
        seed: random seed of the split.
        size: side in pixels of the digits when they are written as files.
    """

    source: str | Path
    val_fraction: float | None
    seed: int
    size: int

    @property
    def name(self) -> str:
        """Name of the data in titles and results."""
        return DIGITS if self.source == DIGITS else Path(self.source).resolve().name

    def held_out_images(self, folder: Path, *, count: int) -> list[HeldOutImage]:
        """Return a random sample of readable held-out images; for the digits, one of each class in turn.

        Args:
            folder: output folder for the digits; not used for a folder of images.
            count: maximum number of images.
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
    """Return the held-out images of `runs_of_models` with the same settings."""
    has_split = source == DIGITS or find_split_folder(source, VAL_SPLITS) is not None
    return CompareData(
        source=source,
        val_fraction=None if has_split else settings.val_fraction,
        seed=settings.seed,
        size=settings.size,
    )


def runs_of_models(names: Sequence[str], source: str | Path, settings: CompareSettings) -> list[ModelRun]:
    """Return one training run per model, all with the same settings.

    Args:
        names: models of lightspine or timm, or published weights to start from (`vmamba_tiny.in1k`), which
            are downloaded.
        source: a folder of images (see `scan_image_folder`), or "digits".
        settings: training settings.

    Raises:
        UsageError: a model is unknown, or the folder or image size is invalid.
        LightspineError: a download failed.
    """
    check_model_names(names)
    _create_data(source, settings)
    for name in filter(is_published, names):
        fetch_published(name)

    def run_of(name: str) -> ModelRun:
        return ModelRun(
            name=name, train=lambda folder, progress: _train_model(name, source, settings, folder, progress)
        )

    return [run_of(name) for name in names]


def runs_of_recipes(recipes: Sequence[str], overrides: Sequence[str] = ()) -> list[ModelRun]:
    """Return one training run per digits recipe, named after its model.

    Args:
        recipes: names such as `digits_shvit_s1`.
        overrides: options of `lightspine train` for all runs.
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


def _train_model(
    name: str, source: str | Path, settings: CompareSettings, folder: Path, progress: bool
) -> TrainResult:
    images = _create_data(source, settings)
    checkpoint = name if is_published(name) else None
    name = name.partition(".")[0] if checkpoint else name
    task = ClassificationTask(
        name,
        images.num_classes,
        checkpoint=checkpoint,
        model_args=_image_size_argument(name, settings.size),
        lr=settings.lr,
        # A shorter warm-up, so that runs of one or two epochs reach the peak learning rate.
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


def _image_size_argument(name: str, size: int) -> dict[str, Any]:
    # Some timm models have a fixed input size, which is a constructor argument.
    cfg = find_timm_cfg(name)
    return {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}
