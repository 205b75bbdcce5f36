"""An exported classifier, detector or segmenter as a PyTorch module, for evaluation and prediction."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.dense import NetworkMetadata
from lightspine.dense.checkpoint import read_network_metadata
from lightspine.errors import LightspineError, UsageError
from lightspine.export.metadata import METADATA_PREFIX
from lightspine.models.checkpoint import Checkpoint
from lightspine.models.metadata import ModelMetadata, read_model_metadata

if TYPE_CHECKING:
    from lightspine_runtime import OnnxModel

_KINDS = {
    "pyramid": "the backbone and feature pyramid of a detector, without its boxes",
    "features": "a backbone without a classifier",
    "classifier": "a classifier",
    "segmenter": "a segmenter",
    "detector": "a detector",
}


class OnnxModule(nn.Module):
    """A module without tensors that ONNX Runtime runs on the CPU.

    Args:
        model: the opened file.

    Raises:
        UsageError: the module is moved to a device or dtype other than cpu and float32.
    """

    def __init__(self, model: "OnnxModel"):
        super().__init__()
        self.model = model
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The module has no tensors, so `to` would succeed without moving anything.
        moved = fn(torch.empty(0))
        if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
            raise UsageError(
                f"the exported file {self.model.path} runs on the CPU in float32 only, got {moved.device} "
                f"and {moved.dtype}"
            )
        return super()._apply(fn, recurse)


class OnnxDetector(OnnxModule):
    """A detector that ONNX Runtime runs, with the interface of a detector in evaluation mode.

    Args:
        model: the opened file.
        score_threshold: minimum score of a prediction; default: that of the file.
        detections_per_image: maximum number of predictions per image; default: that of the file.

    Shape:
        A list of images (3, H, W), 0..1, to a list of dicts, see `lightspine.heads.build_detector`; masks are
        0 or 1.

    Raises:
        UsageError: the file holds no detector, a score_threshold outside 0 to 1 or below that of the file,
            more detections per image than the file returns, or an image of another size than the file takes.
    """

    def __init__(
        self,
        model: "OnnxModel",
        *,
        score_threshold: float | None = None,
        detections_per_image: int | None = None,
    ):
        super().__init__(model)
        if model.detection is None:
            raise UsageError(
                f"expected an exported detector, but {model.path} holds {_KINDS.get(model.kind, 'none')}; "
                "export the detector again, or pass the checkpoint that it was exported from"
            )
        with _runtime_errors_as_own():
            model.check_score_threshold(score_threshold)
        most = model.detection.detections_per_image
        if detections_per_image is not None and detections_per_image > most:
            raise UsageError(
                f"expected at most {most} detections per image, with which {model.path} was exported, got "
                f"{detections_per_image}"
            )
        self.score_threshold = score_threshold
        self.detections_per_image = most if detections_per_image is None else detections_per_image

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detect objects in a list of images (3, H, W); returns one dictionary per image."""
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        pixels = (image.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        with _runtime_errors_as_own():
            found = self.model.detect_pixels(pixels)
        if self.score_threshold is not None:
            found = found.above(self.score_threshold)
        found = found.first(self.detections_per_image)
        masks = {} if found.masks is None else {"masks": torch.from_numpy(found.masks)[:, None].float()}
        return {
            "boxes": torch.from_numpy(found.boxes),
            "scores": torch.from_numpy(found.scores),
            "labels": torch.from_numpy(found.labels),
        } | masks


class OnnxNetwork(OnnxModule):
    """A classifier or segmenter that ONNX Runtime runs.

    A file that takes pixels receives the images without their normalization, rounded to 8 bits. A segmenter
    that returns classes gives logits of 1 for the class of a pixel and 0 for the others: at the size of the
    file's output they have its classes, and where they are resized or averaged, its pixels vote.

    Args:
        model: the opened file.
        num_classes: number of classes of a segmenter that returns classes.

    Shape:
        Normalized images `(B, C, H, W)`, of the sizes that the file takes, to logits `(B, classes)` or, for a
        segmenter, `(B, classes, H, W)`.

    Raises:
        UsageError: the file has neither logits nor classes.
    """

    def __init__(self, model: "OnnxModel", num_classes: int | None = None):
        super().__init__(model)
        self.default_cfg = self.pretrained_cfg = json.loads(model.metadata["preprocessing"])
        if model.outputs == ["classes"] and num_classes is not None:
            self.num_classes = num_classes
            return
        if model.outputs != ["logits"]:
            raise UsageError(
                f"expected an exported classifier or segmenter, but {model.path} holds "
                f"{_KINDS.get(model.kind, 'no classifier')}; pass the checkpoint that it was exported from"
            )
        shape = model.session.get_outputs()[0].shape or []
        if len(shape) < 2 or not isinstance(shape[1], int) or shape[1] < 1:
            raise LightspineError(f"expected logits of shape (batch, classes) in {model.path}, found {shape}")
        self.num_classes = shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a batch of images."""
        images = x.detach().cpu()
        if self.model.pixels:
            images = self._to_pixels(images)
        with _runtime_errors_as_own():
            found = torch.from_numpy(self.model.run(images.contiguous().numpy())[0])
        if self.model.outputs == ["logits"]:
            return found
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < self.num_classes:
            raise LightspineError(
                f"expected classes from 0 to {self.num_classes - 1} from {self.model.path}, got "
                f"{int(found.min())} to {int(found.max())}"
            )
        return torch.nn.functional.one_hot(found, self.num_classes).permute(0, 3, 1, 2).float()

    def _to_pixels(self, images: Tensor) -> Tensor:
        """Return normalized images (B, 3, H, W) as 8-bit pixels (B, H, W, 3)."""
        preprocessing = self.model.preprocessing
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def is_onnx_file(path: str | Path) -> bool:
    """Return whether the name of a file ends in .onnx."""
    return Path(path).suffix.lower() == ".onnx"


def load_onnx(path: str | Path, *, threads: int | None = None) -> tuple[OnnxNetwork, ModelMetadata]:
    """Load an exported classifier.

    Args:
        path: the file.
        threads: number of threads of ONNX Runtime; by default one per core.

    Returns:
        The module and the metadata of the file, as `lightspine.load_model` returns them for a checkpoint.

    Raises:
        UsageError: the file does not exist, is not a classifier or was not written by lightspine, or the
            package lightspine-runtime is not installed.
        LightspineError: ONNX Runtime cannot run the file.
    """
    model = open_exported(path, threads)
    if model.kind in ("segmenter", "detector"):
        raise UsageError(f"expected an exported classifier, but {path} holds a {model.kind}")
    network = OnnxNetwork(model)
    saved = read_model_metadata(_as_checkpoint(model))
    assert saved is not None  # the runtime refuses files without the name of the model
    return network, saved


def load_onnx_segmenter(
    path: str | Path, *, threads: int | None = None
) -> tuple[OnnxNetwork, NetworkMetadata]:
    """Load an exported segmenter.

    Args:
        path: the file.
        threads: number of threads of ONNX Runtime; by default one per core.

    Returns:
        The module and the metadata of the file, as `lightspine.dense.load_network` returns them for a
        checkpoint.

    Raises:
        UsageError: the file does not exist, is not a segmenter, or has no metadata of its checkpoint, or the
            package lightspine-runtime is not installed.
        LightspineError: ONNX Runtime cannot run the file.
    """
    model = open_exported(path, threads)
    if model.kind in ("classifier", "detector"):
        raise UsageError(f"expected an exported segmenter, but {path} holds a {model.kind}")
    metadata = _network_metadata(model, "segmenter")
    return OnnxNetwork(model, metadata.num_classes), metadata


def load_onnx_detector(
    path: str | Path,
    *,
    threads: int | None = None,
    score_threshold: float | None = None,
    detections_per_image: int | None = None,
) -> tuple[OnnxDetector, NetworkMetadata]:
    """Load an exported detector.

    Args:
        path: the file.
        threads: number of threads of ONNX Runtime; by default one per core.
        score_threshold: see `OnnxDetector`.
        detections_per_image: see `OnnxDetector`.

    Returns:
        The module and the metadata of the file, as `lightspine.dense.load_network` returns them for a
        checkpoint, with the settings of the file.

    Raises:
        UsageError: see `OnnxDetector`; the file does not exist or has no metadata of its checkpoint, or the
            package lightspine-runtime is not installed.
        LightspineError: ONNX Runtime cannot run the file.
    """
    model = open_exported(path, threads)
    network = OnnxDetector(model, score_threshold=score_threshold, detections_per_image=detections_per_image)
    metadata = _network_metadata(model, "detector")
    settings = model.detection
    assert settings is not None  # OnnxDetector refuses files without
    options = {
        "resize": settings.resize,
        "resize_rounding": settings.rounding,
        "score_threshold": settings.score_threshold if score_threshold is None else score_threshold,
        "detections_per_image": network.detections_per_image,
    }
    return network, replace(metadata, options=metadata.options | options)


def _network_metadata(model: "OnnxModel", kind: str) -> NetworkMetadata:
    checkpoint = _as_checkpoint(model)
    if not checkpoint.is_dense:
        raise UsageError(
            f"expected a {kind} that `lightspine export` wrote from a checkpoint, but {model.path} has no "
            "metadata of one"
        )
    return read_network_metadata(checkpoint)


def read_onnx_metadata(path: str | Path) -> Checkpoint:
    """Return the metadata of an exported file as a checkpoint without tensors; raises as `load_onnx` does."""
    return _as_checkpoint(open_exported(path, None, compiled_scans=False))


def exported_score_threshold(metadata: Checkpoint) -> float | None:
    """Return the minimum score of an exported detector's detections, `None` for other files.

    Args:
        metadata: from `read_onnx_metadata`.
    """
    # The runtime has checked the entry.
    settings = json.loads(metadata.metadata.get(METADATA_PREFIX + "detection", "null"))
    return None if settings is None else float(settings["score_threshold"])


def _as_checkpoint(model: "OnnxModel") -> Checkpoint:
    return Checkpoint(model.path, {}, {METADATA_PREFIX + key: value for key, value in model.metadata.items()})


def check_runtime(purpose: str) -> None:
    """Check that lightspine-runtime is installed.

    Args:
        purpose: what needs it, for the error message.

    Raises:
        UsageError: it is not.
    """
    try:
        import lightspine_runtime  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{purpose} needs the package lightspine-runtime, but {error.name} is not installed: "
            "pip install lightspine-runtime, or in a checkout pip install ./runtime"
        ) from error


def open_exported(
    path: str | Path, threads: int | None, *, compiled_scans: bool | None = None
) -> "OnnxModel":
    """Open an exported file with lightspine_runtime.

    Args:
        path: the file.
        threads: number of threads of ONNX Runtime; by default one per core.
        compiled_scans: see `lightspine_runtime.OnnxModel`.

    Raises:
        UsageError: the file does not exist or was not written by lightspine, or the package
            lightspine-runtime is not installed.
        LightspineError: ONNX Runtime cannot run the file.
    """
    check_runtime(f"running {path}")
    from lightspine_runtime import OnnxModel

    with _runtime_errors_as_own():
        return OnnxModel(path, threads=threads, compiled_scans=compiled_scans)


@contextmanager
def _runtime_errors_as_own() -> Iterator[None]:
    """Raise the errors of lightspine_runtime as those of lightspine."""
    import lightspine_runtime

    try:
        yield
    except lightspine_runtime.UsageError as error:
        raise UsageError(str(error)) from error
    except lightspine_runtime.LightspineError as error:
        raise LightspineError(str(error)) from error
