"""Load a classifier with its class names and preprocessing."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from lightspine.data.imagenet_classes import imagenet_synsets, synset_descriptions
from lightspine.data.transforms import Preprocessing
from lightspine.errors import LightspineError, UsageError
from lightspine.export.onnx_network import is_onnx_file, load_onnx
from lightspine.models.checkpoint import Checkpoint, Weights
from lightspine.models.factory import create_model, load_model
from lightspine.models.loading import is_checkpoint
from lightspine.models.metadata import CROP_MODES, ModelMetadata, default_preprocessing
from lightspine.models.registry import TIMM_PREFIX, find_record
from lightspine.utils.image_files import MIN_SIDE

__all__ = ["Weights", "class_names", "find_preprocessing", "load_classifier"]


def load_classifier(
    model: str | Path | Checkpoint,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    weights: Weights = "auto",
) -> tuple[nn.Module, ModelMetadata]:
    """Load a model in evaluation mode, with its metadata.

    Args:
        model: a checkpoint, an exported `.onnx` file, or a model name together with `checkpoint`.
        checkpoint: the weights for a model name.
        weights: "model" (as trained), "ema" (their average), or "auto" for the ones whose score is published.

    Raises:
        UsageError: neither a file nor a model name, a name without a checkpoint, or weights that the file
            does not have.
        LightspineError: the checkpoint cannot be read.
    """
    source = model if checkpoint is None else checkpoint
    if not isinstance(source, Checkpoint) and is_onnx_file(source):
        if weights != "auto":
            raise UsageError(f"expected weights='auto' for the exported file {source}, got {weights!r}")
        return load_onnx(source)
    if isinstance(model, Checkpoint) or is_checkpoint(model):
        if checkpoint is not None:
            raise UsageError(f"expected a model name with the checkpoint {checkpoint}, got the file {model}")
        return load_model(model, weights=weights)
    name = str(model)
    if checkpoint is None:
        if Path(name).suffix or "/" in name.removeprefix(TIMM_PREFIX):
            raise UsageError(f"expected a checkpoint file, but {name} does not exist")
        raise UsageError(f"expected a checkpoint with the model name {name!r}, got no weights")
    if find_record(name) is not None:
        return load_model(checkpoint, name=name, weights=weights)
    network = create_model(name, checkpoint=checkpoint, weights=weights).eval()
    return network, ModelMetadata(name, preprocessing=default_preprocessing(network))


def class_names(metadata: ModelMetadata, num_classes: int) -> list[str]:
    """Return the checkpoint's class names; default: ImageNet's for 1000 classes, otherwise class indices.

    Raises:
        LightspineError: the checkpoint has another number of names than of classes.
    """
    if metadata.class_names is not None:
        if len(metadata.class_names) != num_classes:
            raise LightspineError(
                f"expected {num_classes} class names in the weights of {metadata.name}, "
                f"found {len(metadata.class_names)}"
            )
        return metadata.class_names
    if num_classes == 1000:
        return synset_descriptions(imagenet_synsets())
    return [str(i) for i in range(num_classes)]


def find_preprocessing(
    metadata: ModelMetadata,
    *,
    image_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
) -> Preprocessing:
    """Return the image preprocessing of a checkpoint, with overrides.

    Another image size keeps `crop_pct`, so the shorter side is resized to image_size / crop_pct, as in the
    official evaluations of all five families.

    Args:
        metadata: metadata of the checkpoint.
        image_size: height and width in pixels.
        crop_pct: side of the center crop as a fraction of the resized shorter side, above 0 and at most 1.
        crop_mode: "center", "squash" or "border", see `Preprocessing`.

    Raises:
        UsageError: a value out of range.
    """
    if image_size is not None and image_size < MIN_SIDE:
        raise UsageError(f"expected an image size of at least {MIN_SIDE} px, got {image_size}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UsageError(f"expected a crop_pct above 0 and at most 1, got {crop_pct}")
    if crop_mode not in (None, *CROP_MODES):
        raise UsageError(f"expected a crop_mode of {', '.join(CROP_MODES)}, got {crop_mode!r}")
    found = Preprocessing.from_config(metadata.preprocessing, image_size=image_size)
    return replace(found, crop_pct=crop_pct or found.crop_pct, crop_mode=crop_mode or found.crop_mode)
