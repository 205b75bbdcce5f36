"""Load a classifier with its class names and preprocessing."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from lightspine.data.imagenet_classes import imagenet_synsets, synset_descriptions
from lightspine.data.transforms import Preprocessing
from lightspine.errors import UsageError
from lightspine.export.onnx_classifier import is_onnx_file, load_onnx
from lightspine.models.checkpoint import ModelMetadata, Weights, default_preprocessing
from lightspine.models.factory import create_model, load_model
from lightspine.models.registry import find_record
from lightspine.utils.image_files import MIN_SIDE

CROP_MODES = ("center", "squash", "border")

__all__ = ["Weights", "class_names", "find_preprocessing", "load_classifier"]


def load_classifier(
    model: str | Path, checkpoint: str | Path | None = None, *, weights: Weights = "auto"
) -> tuple[nn.Module, ModelMetadata]:
    """Return a model in evaluation mode with its weights, and what is known about it.

    Args:
        model: a checkpoint file, an exported `.onnx` file, or the name of a model together with `checkpoint`.
        checkpoint: the file of weights for a model's name.
        weights: "model" (as trained), "ema" (their average), or "auto" for those whose score is published.

    Raises:
        UsageError: neither a file nor a name, a name without a checkpoint, or weights that the file lacks.
        LightspineError: the checkpoint cannot be read.
    """
    file = model if checkpoint is None else checkpoint
    if is_onnx_file(file):
        if weights != "auto":
            raise UsageError(f"expected no choice of weights for the exported file {file}, got {weights!r}")
        return load_onnx(file)
    if Path(model).is_file():
        if checkpoint is not None:
            raise UsageError(
                f"expected a model's name besides the checkpoint {checkpoint}, got the file {model}"
            )
        return load_model(model, weights=weights)
    name = str(model)
    if checkpoint is None:
        if Path(name).suffix or "/" in name:
            raise UsageError(f"expected a checkpoint file, but {name} does not exist")
        raise UsageError(
            f"expected a checkpoint besides the name {name!r}: a model without weights can only guess"
        )
    if find_record(name) is not None:
        return load_model(checkpoint, name=name, weights=weights)
    network = create_model(name, checkpoint=checkpoint, weights=weights).eval()
    return network, ModelMetadata(name, preprocessing=default_preprocessing(network))


def class_names(saved: ModelMetadata, num_classes: int) -> list[str]:
    """Return the checkpoint's class names, else ImageNet's for 1000 classes, else the numbers."""
    if saved.class_names is not None:
        return saved.class_names
    if num_classes == 1000:
        return synset_descriptions(imagenet_synsets())
    return [str(i) for i in range(num_classes)]


def find_preprocessing(
    saved: ModelMetadata,
    *,
    image_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
) -> Preprocessing:
    """Return how the images of a checkpoint are prepared: as it was published or saved, or as asked for.

    At another size the share of the crop stays, so that the shorter side is resized to size / crop_pct: the
    rule of all five families' own evaluations.

    Args:
        saved: what is known about the checkpoint.
        image_size: height and width in pixels.
        crop_pct: side of the central crop as a share of the resized shorter side, above 0 and at most 1.
        crop_mode: "center", "squash" or "border", see `Preprocessing`.

    Raises:
        UsageError: a value out of its range.
    """
    if image_size is not None and image_size < MIN_SIDE:
        raise UsageError(f"expected an image size of at least {MIN_SIDE} px, got {image_size}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UsageError(f"expected a crop_pct above 0 and at most 1, got {crop_pct}")
    if crop_mode not in (None, *CROP_MODES):
        raise UsageError(f"expected a crop_mode of {', '.join(CROP_MODES)}, got {crop_mode!r}")
    found = Preprocessing.from_config(saved.preprocessing, image_size=image_size)
    return replace(found, crop_pct=crop_pct or found.crop_pct, crop_mode=crop_mode or found.crop_mode)
