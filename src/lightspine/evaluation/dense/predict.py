"""Objects or classes of pixels in single images, as values, pictures, COCO results and label maps."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.atomic import whole_file, write_whole
from lightspine.data.detection import encode_mask
from lightspine.data.images import open_image
from lightspine.dense import SavedNetwork, load_network
from lightspine.dense.saving import read_saved_network
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.dense.checks import FiniteLogits, check_detection_options, check_finite
from lightspine.evaluation.dense.segmenter import choose_test, eval_transform
from lightspine.evaluation.devices import check_device
from lightspine.evaluation.progress import with_bar

DRAWN = 0.5
"""Least score of the objects that are told, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class DensePrediction:
    """What was found in one image.

    Attributes:
        path: the image.
        objects: of a detector, the likeliest first: `name`, `score`, `box` (left, top, right, bottom in
            pixels) and, with a mask head, `mask` (compressed run lengths, as in COCO files).
        shares: of a segmenter: class name -> share of the pixels, the largest first.
        picture: the drawing, if one was made.
    """

    path: Path
    objects: list[dict[str, Any]] | None = None
    shares: dict[str, float] | None = None
    picture: Path | None = None


def predict_dense(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    labels: bool = False,
    coco: str | Path | None = None,
    score_threshold: float = DRAWN,
    skipped: dict[str, str] | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> list[DensePrediction]:
    """Find objects or classes of pixels in images, with a detector or a segmenter.

    Args:
        checkpoint: a file of `lightspine.dense.save_network`.
        images: image files.
        out: a folder for a picture of each image, `NAME.png`; images of one name get a number.
        labels: of a segmenter, write label maps into the folder too, `NAME_labels.png`: the class of a pixel
            is its value.
        coco: of a detector, a file for the objects in COCO's results format. Images are numbered from 1 in
            their order; a list of them with their names lies beside it, `NAME_images.json`.
        score_threshold: least score of the objects.
        skipped: takes path -> reason of images that cannot be read, which are then left out; without it the
            first one is an error.
        device: torch's name of the device.
        progress: show a bar on the standard error.

    Returns:
        One prediction per image that could be read, in their order.

    Raises:
        UsageError: a missing or too small image, an option that the network has no use for.
        LightspineError: a file cannot be read or written; the message names it.

    Example:
        >>> from lightspine.evaluation.dense import predict_dense
        >>> for found in predict_dense("runs/nuclei/model.safetensors", ["a.png"]):  # doctest: +SKIP
        ...     print(found.path, len(found.objects))
    """
    if not images:
        raise UsageError("expected at least one image, got none")
    check_device(device)
    for path in images:
        if not Path(path).is_file():
            raise UsageError(f"expected an image file, but {path} does not exist")
    if labels and out is None:
        raise UsageError("expected a folder out for the label maps")
    network, saved = _load(checkpoint, score_threshold, labels=labels, coco=coco is not None)
    finder: Any = _find_objects if saved.kind == "detector" else _find_classes
    names = saved.class_names or [str(number) for number in range(saved.num_classes)]
    pictures = _picture_paths(images, None if out is None else Path(out))
    network = network.to(device)
    if saved.kind == "segmenter":
        network = FiniteLogits(network, checkpoint)
    found = []
    for path, picture in zip(with_bar(images, "predicting", shown=progress), pictures, strict=True):
        try:
            image = open_image(path)
        except LightspineError as error:
            if skipped is None:
                raise
            skipped[str(path)] = str(error)
            continue
        with torch.inference_mode():
            found.append(finder(network, saved, image, Path(path), picture, names, labels, device))
    if coco is not None:
        _write_coco(found, names, Path(coco))
    return found


def _load(
    checkpoint: str | Path, score_threshold: float, *, labels: bool, coco: bool
) -> tuple[Any, SavedNetwork]:
    is_detector = read_saved_network(checkpoint).kind == "detector"
    if is_detector and labels:
        raise UsageError(f"expected a segmenter for label maps, {checkpoint} holds a detector")
    if not is_detector and coco:
        raise UsageError(f"expected a detector for COCO results, {checkpoint} holds a segmenter")
    if not is_detector and score_threshold != DRAWN:
        raise UsageError(f"expected no score threshold for the segmenter in {checkpoint}")
    options = {"score_threshold": score_threshold} if is_detector else {}
    check_detection_options(options)
    network, saved = load_network(checkpoint, **options)
    check_finite(network, checkpoint)
    return network, saved


def _find_objects(
    network: Any,
    saved: SavedNetwork,  # noqa: ARG001  as of _find_classes
    image: Image.Image,
    path: Path,
    picture: Path | None,
    names: Sequence[str],
    labels: bool,  # noqa: ARG001
    device: str,
) -> DensePrediction:
    pixels = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True).to(device)
    found = {name: value.cpu() for name, value in network([pixels])[0].items()}
    objects: list[dict[str, Any]] = [
        {"name": names[label - 1], "score": score, "box": box}
        for label, score, box in zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
        )
    ]
    for entry, mask in zip(objects, found.get("masks", []), strict=False):
        entry["mask"] = encode_mask((mask[0] >= 0.5).numpy())
    if picture is not None:
        from lightspine.evaluation.draw import draw_detections

        draw_detections(image, found, names, picture, least_score=0.0)
    return DensePrediction(path=path, objects=objects, picture=picture)


def _find_classes(
    network: Any,
    saved: SavedNetwork,
    image: Image.Image,
    path: Path,
    picture: Path | None,
    names: Sequence[str],
    labels: bool,
    device: str,
) -> DensePrediction:
    nothing = tv_tensors.Mask(torch.zeros(image.height, image.width, dtype=torch.uint8))
    pixels, _ = eval_transform(saved, saved.settings)(tv_tensors.Image(F.pil_to_tensor(image)), nothing)
    classes = choose_test(saved).classify(network, pixels.to(device), (image.height, image.width)).cpu()
    counts = torch.bincount(classes.flatten(), minlength=len(names))
    order = counts.argsort(descending=True).tolist()
    shares = {names[number]: int(counts[number]) / classes.numel() for number in order if counts[number]}
    if picture is not None:
        from lightspine.evaluation.draw import draw_classes

        draw_classes(image, classes.numpy(), names, picture)
        if labels:
            with whole_file(picture.with_name(f"{picture.stem}_labels.png")) as file:
                Image.fromarray(classes.numpy().astype(np.uint8)).save(file, format="PNG")
    return DensePrediction(path=path, shares=shares, picture=picture)


def _picture_paths(images: Sequence[str | Path], out: Path | None) -> Iterator[Path | None]:
    taken: set[str] = set()
    for path in images:
        stem, number = Path(path).stem, 1
        while stem in taken:
            number += 1
            stem = f"{Path(path).stem}_{number}"
        taken.add(stem)
        yield None if out is None else out / f"{stem}.png"


def _write_coco(found: Sequence[DensePrediction], names: Sequence[str], file: Path) -> None:
    results = []
    for number, prediction in enumerate(found, 1):
        for entry in prediction.objects or []:
            left, top, right, bottom = entry["box"]
            result = {
                "image_id": number,
                "category_id": names.index(entry["name"]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "score": entry["score"],
            }
            results.append(result | ({"segmentation": entry["mask"]} if "mask" in entry else {}))
    listing = {
        "images": [
            {"id": number, "file_name": str(prediction.path)} for number, prediction in enumerate(found, 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
    }
    write_whole(file, json.dumps(results) + "\n")
    write_whole(file.with_name(f"{file.stem}_images.json"), json.dumps(listing) + "\n")
