"""Object detection and semantic segmentation of image files."""

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

from lightspine.data.detection import encode_mask
from lightspine.data.segmentation import SlidingWindowInference
from lightspine.dense import NetworkMetadata
from lightspine.dense.checkpoint import read_network_metadata
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.common import FiniteLogits
from lightspine.evaluation.detection import check_detection_options, open_detector
from lightspine.evaluation.segmentation import choose_settings, choose_test, create_transform, open_segmenter
from lightspine.export.onnx_network import exported_score_threshold, is_onnx_file, read_onnx_metadata
from lightspine.models.checkpoint import Checkpoint, Weights, read_checkpoint
from lightspine.utils.devices import check_device
from lightspine.utils.files import atomic_write, atomic_write_text
from lightspine.utils.image_files import open_image
from lightspine.utils.progress import progress_bar
from lightspine.utils.resource_errors import resource_errors

DEFAULT_MAX_DRAWN = 100
"""Maximum number of objects drawn into an image; more would cover it."""

DEFAULT_SCORE_THRESHOLD = 0.5
"""Minimum score of predicted objects; checkpoints have a lower threshold for evaluation."""


@dataclass(frozen=True, kw_only=True)
class DensePrediction:
    """Prediction of a detector or segmenter for one image.

    Attributes:
        path: the image.
        objects: of a detector, sorted by score: `name`, `score`, `box` (left, top, right, bottom in pixels)
            and, with a mask head, `mask` (compressed run-length encoding, as in COCO files).
        shares: of a segmenter: class name -> fraction of the pixels, largest first.
        picture: path of the drawing, if one was written.
    """

    path: Path
    objects: list[dict[str, Any]] | None = None
    shares: dict[str, float] | None = None
    picture: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DetectionPredictor:
    """Predicts objects with a detector.

    Attributes:
        network: the detector, in evaluation mode on its device.
        names: class names.
        device: PyTorch device.
        max_drawn: maximum number of objects drawn into an image.
    """

    network: Any
    names: Sequence[str]
    device: str
    max_drawn: int = DEFAULT_MAX_DRAWN

    def predict(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Predict the objects of an image and, unless `picture` is `None`, draw them to that file."""
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

            draw_detections(image, found, self.names, picture, min_score=0.0, max_drawn=self.max_drawn)
        return DensePrediction(path=path, objects=objects, picture=picture)


@dataclass(frozen=True, kw_only=True)
class SegmentationPredictor:
    """Predicts segmentation maps with a segmenter.

    Attributes:
        network: the segmenter, in evaluation mode on its device.
        names: class names.
        device: PyTorch device.
        metadata: metadata of the checkpoint.
        settings: resizing of the images, see `choose_settings`.
        test: sliding-window and test-time augmentation settings.
        labels: also write label maps.
    """

    network: Any
    names: Sequence[str]
    device: str
    metadata: NetworkMetadata
    settings: dict[str, Any]
    test: SlidingWindowInference
    labels: bool

    def predict(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Predict the segmentation map of an image and, unless `picture` is `None`, draw it to that file."""
        no_labels = tv_tensors.Mask(torch.zeros(image.height, image.width, dtype=torch.uint8))
        transform = create_transform(self.metadata, self.settings)
        pixels, _ = transform(tv_tensors.Image(F.pil_to_tensor(image)), no_labels)
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


@resource_errors()
def predict_dense(
    checkpoint: str | Path | Checkpoint,
    images: Sequence[str | Path],
    *,
    weights: Weights = "auto",
    out: str | Path | None = None,
    labels: bool = False,
    coco: str | Path | None = None,
    score_threshold: float | None = None,
    resize: tuple[int, int] | None = None,
    detections_per_image: int | None = None,
    max_drawn: int | None = None,
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
    """Predict objects or segmentation maps of image files with a detector or segmenter.

    Args:
        checkpoint: `.safetensors`, `.ckpt` or exported `.onnx` file, or an opened checkpoint.
        images: image files.
        weights: see `evaluate_detector`.
        out: folder for a drawing of each image, `NAME.png`; a repeated name gets a number.
        labels: segmenter: also write label maps, `NAME_labels.png`, whose pixel values are class indices.
        coco: detector: file for the objects in COCO's results format. Images are numbered from 1 in their
            order; `NAME_images.json` in the same folder lists them.
        score_threshold: detector: minimum score of the objects; default: `DEFAULT_SCORE_THRESHOLD`.
        resize: detector: see `evaluate_detector`.
        detections_per_image: detector: maximum number of objects per image; default: the checkpoint's.
        max_drawn: detector: maximum number of objects drawn into an image, those of the highest scores;
            default: `DEFAULT_MAX_DRAWN`. The results contain all objects.
        scale: segmenter: see `evaluate_segmenter`.
        own_size: segmenter: see `evaluate_segmenter`.
        window: segmenter: see `evaluate_segmenter`.
        stride: segmenter: see `evaluate_segmenter`.
        ratios: segmenter: see `evaluate_segmenter`.
        flip: segmenter: see `evaluate_segmenter`.
        skipped: receives path -> reason of images that cannot be read; without it they raise an error.
        device: PyTorch device.
        progress: show a progress bar on standard error.

    Returns:
        One prediction per readable image, in their order.

    Raises:
        UsageError: a missing or too small image, or an option that does not apply to the network.
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
        raise UsageError("expected an output folder (out) for the label maps")
    detector_options = {
        "score_threshold": score_threshold,
        "resize": resize,
        "detections_per_image": detections_per_image,
    }
    segmenter_options = {
        "scale": scale,
        "own_size": own_size,
        "window": window,
        "stride": stride,
        "ratios": ratios,
        "flip": flip,
    }
    predictor: DetectionPredictor | SegmentationPredictor
    opened: Path | Checkpoint
    if not isinstance(checkpoint, Checkpoint) and is_onnx_file(checkpoint):
        opened = Path(checkpoint)
        about = read_onnx_metadata(opened)
        kind = read_network_metadata(about).kind
        least = exported_score_threshold(about)
        if least is not None and score_threshold is None:
            detector_options["score_threshold"] = max(DEFAULT_SCORE_THRESHOLD, least)
    else:
        opened = read_checkpoint(checkpoint)
        kind = read_network_metadata(opened).kind
    if kind == "detector":
        _reject_options(opened, "detector", segmenter_options | {"labels": labels})
        predictor = _load_detection_predictor(
            opened, weights, detector_options, DEFAULT_MAX_DRAWN if max_drawn is None else max_drawn, device
        )
    else:
        _reject_options(opened, "segmenter", detector_options | {"coco": coco, "max_drawn": max_drawn})
        predictor = _load_segmentation_predictor(opened, weights, segmenter_options, labels, device)
    pictures = _picture_paths(images, None if out is None else Path(out))
    predictions = []
    for path, picture in zip(progress_bar(images, "predicting", shown=progress), pictures, strict=True):
        try:
            image = open_image(path)
        except LightspineError as error:
            if skipped is None:
                raise
            skipped[str(path)] = str(error)
            continue
        with torch.inference_mode():
            predictions.append(predictor.predict(image, Path(path), picture))
    if coco is not None:
        _write_coco(predictions, predictor.names, Path(coco))
    return predictions


def _reject_options(file: Path | Checkpoint, kind: str, options: dict[str, Any]) -> None:
    if given := [name for name, value in options.items() if value is not None and value is not False]:
        label = file.label if isinstance(file, Checkpoint) else file
        raise UsageError(f"{given[0]} does not apply to the {kind} in {label}")


def _load_detection_predictor(
    checkpoint: Path | Checkpoint, weights: Weights, options: dict[str, Any], max_drawn: int, device: str
) -> DetectionPredictor:
    given = {name: value for name, value in options.items() if value is not None}
    if max_drawn < 1:
        raise UsageError(f"expected max_drawn of at least 1, got {max_drawn}")
    overrides = {"score_threshold": DEFAULT_SCORE_THRESHOLD} | given
    check_detection_options(overrides)
    network, metadata, _ = open_detector(checkpoint, weights=weights, **overrides)
    return DetectionPredictor(
        network=network.to(device), names=_class_names(metadata), device=device, max_drawn=max_drawn
    )


def _load_segmentation_predictor(
    source: Path | Checkpoint, weights: Weights, options: dict[str, Any], labels: bool, device: str
) -> SegmentationPredictor:
    network, metadata, label = open_segmenter(source, weights=weights)
    test_options = {name: value for name, value in options.items() if name not in ("scale", "own_size")}
    return SegmentationPredictor(
        network=FiniteLogits(network.to(device), label),
        names=_class_names(metadata),
        device=device,
        metadata=metadata,
        settings=choose_settings(metadata, scale=options["scale"], own_size=options["own_size"]),
        test=choose_test(metadata, **test_options),
        labels=labels,
    )


def _class_names(metadata: NetworkMetadata) -> list[str]:
    return metadata.class_names or [str(number) for number in range(metadata.num_classes)]


def _picture_paths(images: Sequence[str | Path], out: Path | None) -> Iterator[Path | None]:
    taken: set[str] = set()
    for path in images:
        stem, number = Path(path).stem, 1
        while stem in taken:
            number += 1
            stem = f"{Path(path).stem}_{number}"
        taken.add(stem)
        yield None if out is None else out / f"{stem}.png"


def _write_coco(predictions: Sequence[DensePrediction], names: Sequence[str], file: Path) -> None:
    results = []
    for image_id, prediction in enumerate(predictions, 1):
        for entry in prediction.objects or []:
            left, top, right, bottom = entry["box"]
            result = {
                "image_id": image_id,
                "category_id": names.index(entry["name"]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "score": entry["score"],
            }
            results.append(result | ({"segmentation": entry["mask"]} if "mask" in entry else {}))
    listing = {
        "images": [
            {"id": image_id, "file_name": str(prediction.path)}
            for image_id, prediction in enumerate(predictions, 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
    }
    atomic_write_text(file, json.dumps(results) + "\n")
    atomic_write_text(file.with_name(f"{file.stem}_images.json"), json.dumps(listing) + "\n")
