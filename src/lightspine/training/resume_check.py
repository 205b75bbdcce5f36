"""Check that a checkpoint to resume from belongs to the same model, classes and split."""

import logging
from pathlib import Path
from typing import Any

import torch

from lightspine.data.modules import ImageDataModule
from lightspine.data.split_record import SplitRecord
from lightspine.dense import NetworkMetadata
from lightspine.dense.checkpoint import read_network_metadata
from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import CKPT_METADATA, Checkpoint, find_metadata
from lightspine.models.metadata import ModelMetadata, read_model_metadata
from lightspine.training.base import LightspineTask
from lightspine.training.checkpoint import load_training_state

_log = logging.getLogger(__name__)


def check_resumed(path: Path, task: LightspineTask, data: ImageDataModule) -> None:
    """Check that a run can resume from a checkpoint.

    A changed image size and changed images are allowed, and logged.

    Args:
        path: the checkpoint.
        task: the task of the run.
        data: the data of the run.

    Raises:
        UsageError: the checkpoint is of another model, other classes or another split of the same images.
    """
    stored = load_training_state(path, mmap=True)
    # Files of earlier versions have no metadata.
    if CKPT_METADATA in stored:
        known = _describe(Checkpoint(path, {}, find_metadata(stored)))
        own = _describe(Checkpoint(None, {}, task.run_metadata(data)))
        _check_model(path, known, own)
        _check_classes(path, known.class_names or [], data.class_names)
        _check_split(path, known.run.get("data"), data.split_record())
        for before, now in zip(_sizes(known), _sizes(own), strict=True):
            if before != now:
                _log.warning(
                    "the resumed run had the image size or settings %s, this one has %s", before, now
                )
    _check_shapes(path, stored["state_dict"], task)


def _describe(checkpoint: Checkpoint) -> ModelMetadata | NetworkMetadata:
    if checkpoint.is_dense:
        return read_network_metadata(checkpoint)
    found = read_model_metadata(checkpoint)
    if found is None:
        raise LightspineError(f"{checkpoint.label} has damaged metadata: they have no model")
    return found


def _check_model(
    path: Path, known: ModelMetadata | NetworkMetadata, own: ModelMetadata | NetworkMetadata
) -> None:
    before, now = (
        about.name if isinstance(about, ModelMetadata) else f"{about.head} over {about.model}"
        for about in (known, own)
    )
    if before != now:
        raise UsageError(f"expected a checkpoint of {now} to resume from, but {path} is of {before}")


def _check_classes(path: Path, known: list[str], own: list[str]) -> None:
    if len(known) != len(own):
        raise UsageError(
            f"expected the {len(known)} classes of the resumed run {path} in the data, got {len(own)}"
        )
    for number, (before, now) in enumerate(zip(known, own, strict=True)):
        if before != now:
            raise UsageError(
                f"expected the classes of the resumed run {path} in the same order, but class {number} is "
                f"{before!r} there and {now!r} in the data"
            )


def _check_split(path: Path, known: dict[str, Any] | None, own: SplitRecord | None) -> None:
    if known is None or own is None:
        return
    before = SplitRecord.from_dict(known)
    if (before.train_sha256, before.val_sha256) == (own.train_sha256, own.val_sha256):
        return
    if before.all_sha256 is not None and before.all_sha256 == own.all_sha256:
        raise UsageError(
            f"expected the split of the resumed run {path} (val_fraction {before.val_fraction}, seed "
            f"{before.seed}), got val_fraction {own.val_fraction} and seed {own.seed}: images that it was "
            "trained on would be held out"
        )
    _log.warning(
        "the images are not those of the resumed run %s: if they overlap, images that it was trained on may "
        "now be held out",
        path,
    )


def _sizes(about: ModelMetadata | NetworkMetadata) -> tuple[Any, Any]:
    """Return the image size, and the further settings of the evaluation."""
    if isinstance(about, ModelMetadata):
        preprocessing = dict(about.preprocessing)
        return preprocessing.pop("input_size", None), preprocessing
    settings = dict(about.settings)
    size = settings.pop("scale", None) if about.kind == "segmenter" else about.options.get("resize")
    return size, settings


def _check_shapes(path: Path, stored: dict[str, Any], task: LightspineTask) -> None:
    expected = task.state_dict()
    differences = [
        f"{name} is {_shape(stored[name])} in the file and {_shape(value)} in the model"
        for name, value in expected.items()
        if name in stored and stored[name].shape != value.shape
    ]
    differences += [f"{name} is missing in the file" for name in expected if name not in stored]
    differences += [f"{name} is not in the model" for name in stored if name not in expected]
    if differences:
        raise UsageError(
            f"{path} does not fit {task.model_name} with the arguments of this run, {len(differences)} "
            f"tensors differ: {'; '.join(differences[:3])}"
        )


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
