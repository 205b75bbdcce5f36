"""Predict objects or per-pixel classes with a detector or segmenter."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.detection import encode_mask
from lightspine.data.segmentation import SlidingWindowInference
from lightspine.dense import NetworkMetadata, load_network
from lightspine.dense.checkpoint import read_network_metadata
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.dense_common import FiniteLogits, check_detection_options, check_finite
from lightspine.evaluation.segmentation import choose_settings, choose_test, eval_transform
from lightspine.utils.devices import check_device
from lightspine.utils.files import atomic_write, atomic_write_text
from lightspine.utils.image_files import open_image
from lightspine.utils.progress import progress_bar


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


class Predictor(Protocol):
    """Finds objects or classes of pixels."""

    def find(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Return what is in an image of a path, drawn into a picture where one is asked for."""
        ...


@dataclass(frozen=True, kw_only=True)
class DetectionPredictor:
    """Finds objects.

    Attributes:
        network: the detector, on its device, with the options it is to run with.
        names: of its classes.
        device: torch's name of the device.
    """

    network: Any
    names: Sequence[str]
    device: str

    def find(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Return the objects in an image, the likeliest first."""
        pixels = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True).to(self.device)
        found = {name: value.cpu() for name, value in self.network([pixels])[0].items()}
        objects: list[dict[str, Any]] = [
            {"name": self.names[label - 1], "score": score, "box": box}
            for label, score, box in zip(
                found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
            )
        ]
        for entry, mask in zip(objects, found.get("masks", []), strict=False):
            entry["mask"] = encode_mask((mask[0] >= 0.5).numpy())
        if picture is not None:
            from lightspine.evaluation.draw import draw_detections

            draw_detections(image, found, self.names, picture, least_score=0.0)
        return DensePrediction(path=path, objects=objects, picture=picture)


@dataclass(frozen=True, kw_only=True)
class SegmentationPredictor:
    """Finds the class of each pixel.

    Attributes:
        network: the segmenter, on its device.
        names: of its classes.
        device: torch's name of the device.
        saved: what its file says of it.
        settings: the file's, with what was asked for in place of its own.
        test: how it looks at an image.
        labels: write label maps beside the pictures.
    """

    network: Any
    names: Sequence[str]
    device: str
    saved: NetworkMetadata
    settings: dict[str, Any]
    test: SlidingWindowInference
    labels: bool

    def find(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Return the shares of the classes in an image, the largest first."""
        nothing = tv_tensors.Mask(torch.zeros(image.height, image.width, dtype=torch.uint8))
        prepare = eval_transform(self.saved, self.settings)
        pixels, _ = prepare(tv_tensors.Image(F.pil_to_tensor(image)), nothing)
        size = image.height, image.width
        classes = self.test.classify(self.network, pixels.to(self.device), size).cpu()
        counts = torch.bincount(classes.flatten(), minlength=len(self.names))
        order = counts.argsort(descending=True).tolist()
        shares = {
            self.names[number]: int(counts[number]) / classes.numel() for number in order if counts[number]
        }
        if picture is not None:
            from lightspine.evaluation.draw import draw_classes

            draw_classes(image, classes.numpy(), self.names, picture)
            if self.labels:
                with atomic_write(picture.with_name(f"{picture.stem}_labels.png")) as file:
                    Image.fromarray(classes.numpy().astype(np.uint8)).save(file, format="PNG")
        return DensePrediction(path=path, shares=shares, picture=picture)


DRAWN = 0.5
"""Least score of the objects that are told, where nothing else is asked for."""


def predict_dense(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    labels: bool = False,
    coco: str | Path | None = None,
    score_threshold: float | None = None,
    resize: tuple[int, int] | None = None,
    detections_per_image: int | None = None,
    scale: tuple[int, int] | None = None,
    own_size: bool = False,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    ratios: Sequence[float] | None = None,
    flip: bool = False,
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
        score_threshold: of a detector, least score of the objects; `DRAWN` by default.
        resize: of a detector, as in `evaluate_detector`.
        detections_per_image: of a detector, most objects of an image, instead of the checkpoint's.
        scale: of a segmenter, as in `evaluate_segmenter`, like all that follow.
        own_size: leave the images at their own size.
        window: height and width of a sliding window.
        stride: of the window, down and across.
        ratios: factors of the image's size whose probabilities are averaged.
        flip: average over the mirrored image too.
        skipped: takes path -> reason of images that cannot be read, which are then left out; without it the
            first one is an error.
        device: torch's name of the device.
        progress: show a bar on the standard error.

    Returns:
        One prediction per image that could be read, in their order.

    Raises:
        UsageError: a missing or too small image, an option that the network has no use for.
        LightspineError: a file cannot be read or written; the message names it.

    Examples:
        >>> from lightspine.evaluation import predict_dense
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
    of_detectors = {
        "score_threshold": score_threshold,
        "resize": resize,
        "detections_per_image": detections_per_image,
    }
    of_segmenters = {
        "scale": scale,
        "own_size": own_size,
        "window": window,
        "stride": stride,
        "ratios": ratios,
        "flip": flip,
    }
    if read_network_metadata(checkpoint).kind == "detector":
        _refuse(checkpoint, "detector", of_segmenters | {"labels": labels})
        finder, names = _open_detector(checkpoint, of_detectors, device)
    else:
        _refuse(checkpoint, "segmenter", of_detectors | {"coco": coco})
        finder, names = _open_segmenter(checkpoint, of_segmenters, labels, device)
    pictures = _picture_paths(images, None if out is None else Path(out))
    found = []
    for path, picture in zip(progress_bar(images, "predicting", shown=progress), pictures, strict=True):
        try:
            image = open_image(path)
        except LightspineError as error:
            if skipped is None:
                raise
            skipped[str(path)] = str(error)
            continue
        with torch.inference_mode():
            found.append(finder.find(image, Path(path), picture))
    if coco is not None:
        _write_coco(found, names, Path(coco))
    return found


def _refuse(checkpoint: str | Path, kind: str, options: dict[str, Any]) -> None:
    if given := [name for name, value in options.items() if value is not None and value is not False]:
        raise UsageError(f"{given[0]} means nothing for the {kind} in {checkpoint}")


def _open_detector(
    checkpoint: str | Path, options: dict[str, Any], device: str
) -> tuple[Predictor, Sequence[str]]:
    given = {"score_threshold": DRAWN} | {name: value for name, value in options.items() if value is not None}
    check_detection_options(given)
    network, saved = load_network(checkpoint, **given)
    check_finite(network, checkpoint)
    names = saved.class_names or [str(number) for number in range(saved.num_classes)]
    return DetectionPredictor(network=network.to(device), names=names, device=device), names


def _open_segmenter(
    checkpoint: str | Path, options: dict[str, Any], labels: bool, device: str
) -> tuple[Predictor, Sequence[str]]:
    network, saved = load_network(checkpoint)
    check_finite(network, checkpoint)
    names = saved.class_names or [str(number) for number in range(saved.num_classes)]
    looks = {name: value for name, value in options.items() if name not in ("scale", "own_size")}
    finder = SegmentationPredictor(
        network=FiniteLogits(network.to(device), checkpoint),
        names=names,
        device=device,
        saved=saved,
        settings=choose_settings(saved, scale=options["scale"], own_size=options["own_size"]),
        test=choose_test(saved, **looks),
        labels=labels,
    )
    return finder, names


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
    atomic_write_text(file, json.dumps(results) + "\n")
    atomic_write_text(file.with_name(f"{file.stem}_images.json"), json.dumps(listing) + "\n")
