"""The most likely classes of single images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lightspine.data.images import open_image
from lightspine.data.transforms import create_eval_transform
from lightspine.errors import UsageError
from lightspine.evaluation.networks import Weights, class_names, find_preprocessing, load_network
from lightspine.utils.devices import check_device


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
    weights: Weights = "auto",
    topk: int = 5,
    image_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    device: str = "cpu",
) -> list[Prediction]:
    """Tell the likeliest classes of image files.

    Args:
        model: a checkpoint file, or the name of a model together with `checkpoint`.
        images: image files.
        checkpoint: the file of weights for a model's name.
        weights: "model" (as trained), "ema" (their average), or "auto" for those whose score is published.
        topk: how many classes to tell; at most all.
        image_size: height and width in pixels instead of the checkpoint's own.
        crop_pct: see `lightspine.evaluation.networks.find_preprocessing`.
        crop_mode: likewise.
        device: torch's name of the device.

    Returns:
        One prediction per image, in the order of `images`.

    Raises:
        UsageError: a name without a checkpoint, a missing or too small image, topk below 1.
        LightspineError: an image or the checkpoint cannot be read; the message names it.

    Examples:
        >>> from lightspine.evaluation import predict
        >>> for prediction in predict("runs/digits/model.safetensors", ["seven.png"]):  # doctest: +SKIP
        ...     print(prediction.path, prediction.classes[0].name)
    """
    if topk < 1:
        raise UsageError(f"expected topk of at least 1, got {topk}")
    check_device(device)
    network, saved = load_network(model, checkpoint, weights=weights)
    network = network.to(device)
    transform = create_eval_transform(
        find_preprocessing(saved, image_size=image_size, crop_pct=crop_pct, crop_mode=crop_mode)
    )
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
