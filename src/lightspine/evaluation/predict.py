"""The most likely classes of single images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import nn

from lightspine.data.images import open_image
from lightspine.data.transforms import Preprocessing, create_eval_transform
from lightspine.errors import UsageError
from lightspine.models._factory import create_model
from lightspine.models._loading import load_model
from lightspine.models._registry import find_record
from lightspine.models._saving import SavedModel, default_preprocessing


@dataclass(frozen=True)
class ClassScore:
    """One class and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first."""

    path: Path
    classes: list[ClassScore]


def predict(
    model: str | Path,
    images: Iterable[str | Path],
    *,
    checkpoint: str | Path | None = None,
    topk: int = 5,
    image_size: int | None = None,
    device: str = "cpu",
) -> list[Prediction]:
    """Tell the likeliest classes of image files.

    Args:
        model: a checkpoint file, or the name of a model together with `checkpoint`.
        images: image files.
        checkpoint: the file of weights for a model's name.
        topk: how many classes to tell; at most all.
        image_size: height and width in pixels instead of the checkpoint's own.
        device: torch's name of the device.

    Returns:
        One prediction per image, in the order of `images`.

    Raises:
        UsageError: a name without a checkpoint, a missing or too small image, topk below 1.
        LightspineError: an image or the checkpoint cannot be read; the message names it.

    Example:
        >>> from lightspine.evaluation import predict
        >>> for prediction in predict("runs/digits/model.safetensors", ["seven.png"]):  # doctest: +SKIP
        ...     print(prediction.path, prediction.classes[0].name)
    """
    if topk < 1:
        raise UsageError(f"expected topk of at least 1, got {topk}")
    network, saved = load_network(model, checkpoint)
    network = network.to(device)
    transform = create_eval_transform(Preprocessing.from_config(saved.preprocessing, image_size=image_size))
    names: list[str] | None = None
    predictions = []
    for path in images:
        # One at a time: official models take any number, and a bad file is named before the rest is read.
        pixels = transform(open_image(path)).unsqueeze(0).to(device)
        with torch.inference_mode():
            probabilities = network(pixels)[0].float().softmax(dim=-1)
        names = names or class_names(saved, len(probabilities))
        top = probabilities.topk(min(topk, len(probabilities)))
        scores = [
            ClassScore(names[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        predictions.append(Prediction(Path(path), scores))
    return predictions


def load_network(model: str | Path, checkpoint: str | Path | None = None) -> tuple[nn.Module, SavedModel]:
    """Return a model in evaluation mode with its weights, and what is known about it.

    Args:
        model: a checkpoint file, or the name of a model together with `checkpoint`.
        checkpoint: the file of weights for a model's name.

    Raises:
        UsageError: neither a file nor a name, or a name without a checkpoint.
        LightspineError: the checkpoint cannot be read.
    """
    if Path(model).is_file():
        if checkpoint is not None:
            raise UsageError(
                f"expected a model's name besides the checkpoint {checkpoint}, got the file {model}"
            )
        return load_model(model)
    name = str(model)
    if checkpoint is None:
        if Path(name).suffix or "/" in name:
            raise UsageError(f"expected a checkpoint file, but {name} does not exist")
        raise UsageError(
            f"expected a checkpoint besides the name {name!r}: a model without weights can only guess"
        )
    if find_record(name) is not None:
        return load_model(checkpoint, name=name)
    network = create_model(name, checkpoint=checkpoint).eval()
    return network, SavedModel(name, preprocessing=default_preprocessing(network))


def class_names(saved: SavedModel, num_classes: int) -> list[str]:
    """Return the checkpoint's class names, else ImageNet's for 1000 classes, else the numbers."""
    if saved.class_names is not None:
        return saved.class_names
    if num_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(i) for i in range(num_classes)]
    return [str(i) for i in range(num_classes)]
