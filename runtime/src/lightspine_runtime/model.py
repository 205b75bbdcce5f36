"""An exported model that ONNX Runtime runs on the CPU."""

import importlib.util
import json
import logging
import mmap
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from lightspine_runtime.detection import (
    Detections,
    DetectionSettings,
    resize_masks,
    resize_pixels,
    resized_size,
)
from lightspine_runtime.errors import LightspineError, UsageError
from lightspine_runtime.images import open_image
from lightspine_runtime.preprocessing import Preprocessing, normalize, resize_and_crop

if TYPE_CHECKING:
    from lightspine_runtime.scan_session import ScanSession

_METADATA_PREFIX = "lightspine."
_FAST_PACKAGES = ("numba", "onnx")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassScore:
    """One class and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, in descending order."""

    path: Path
    classes: list[ClassScore]


class OnnxModel:
    """A model that `lightspine export` wrote.

    Attributes:
        path: the file.
        name: name of the model.
        kind: "classifier", "features", "pyramid", "detector" or "segmenter".
        class_names: one name per class, or `None` if the file has none.
        preprocessing: how images are resized, cropped and normalized.
        pixels: whether the model takes 8-bit pixels (B, H, W, 3) instead of normalized images (B, 3, H, W).
        detection: settings of a detector, else `None`.
        outputs: names of the outputs.
        metadata: all entries of the file as text: version, commit, precision, source and others.
        compiled_scans: whether the scans of VMamba and Vim are computed by kernels of this package instead of
            the loops in the file.
        session: the `onnxruntime.InferenceSession`, or a `lightspine_runtime.scan_session.ScanSession`, which
            has the same `run`, with compiled scans.

    Args:
        path: the file.
        threads: number of threads of ONNX Runtime and of compiled scans; by default one per core, with
            compiled scans at most 16.
        compiled_scans: compute the scans by kernels that numba compiles, which takes some seconds when such a
            file is opened for the first time on a machine. By default if the file has scans as functions and
            numba and onnx are installed (`pip install 'lightspine-runtime[fast]'`); `False` leaves the scans
            to ONNX Runtime.

    Raises:
        UsageError: the file does not exist or was not written by lightspine, or compiled_scans is `True` and
            they cannot be used for the file.
        LightspineError: ONNX Runtime cannot run the file, or its metadata is damaged.

    Examples:
        >>> from lightspine_runtime import OnnxModel
        >>> model = OnnxModel("model.onnx")  # doctest: +SKIP
        >>> model.predict(["seven.png"])[0].classes[0]  # doctest: +SKIP
        ClassScore(name='7', probability=0.98)
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, compiled_scans: bool | None = None
    ) -> None:
        self.path = Path(path)
        self.session = _create_session(self.path, threads, compiled_scans)
        self.compiled_scans = not isinstance(self.session, onnxruntime.InferenceSession)
        entries, self.outputs, inputs = _describe_session(self.session, str(path))
        self.metadata = {
            key.removeprefix(_METADATA_PREFIX): value
            for key, value in entries.items()
            if key.startswith(_METADATA_PREFIX)
        }
        if "model" not in self.metadata or "preprocessing" not in self.metadata:
            raise UsageError(
                f"expected a file that `lightspine export` wrote, but {path} has no metadata about its "
                "preprocessing"
            )
        try:
            preprocessing = json.loads(self.metadata["preprocessing"])
            self.class_names: list[str] | None = json.loads(self.metadata.get("class_names", "null"))
            self.pixels: bool = json.loads(self.metadata.get("pixels", "false"))
            detection = json.loads(self.metadata.get("detection", "null"))
        # A RecursionError for values that are nested too deeply.
        except (ValueError, RecursionError) as error:
            raise LightspineError(f"{path} has damaged metadata: {error}") from error
        _check_types(str(path), self.class_names, self.pixels)
        self.name, self.kind = self.metadata["model"], self.metadata.get("kind", "classifier")
        self.preprocessing = Preprocessing.from_mapping(preprocessing, str(path))
        self.detection = None if detection is None else DetectionSettings.from_mapping(detection, str(path))
        if len(inputs) != 1:
            raise UsageError(f"expected one input in {path}, found {len(inputs)}")

        self._input = inputs[0]

    def __repr__(self) -> str:
        return (
            f"OnnxModel({str(self.path)!r}, name={self.name!r}, kind={self.kind!r}, "
            f"compiled_scans={self.compiled_scans})"
        )

    @property
    def about(self) -> dict[str, str]:
        """Deprecated name of `metadata`."""
        warnings.warn("OnnxModel.about is deprecated, use OnnxModel.metadata", FutureWarning, stacklevel=2)
        return self.metadata

    def preprocess(self, image: Image.Image) -> NDArray[Any]:
        """Resize, crop and normalize an RGB image.

        Returns:
            Float32 (3, H, W), or uint8 (H, W, 3) for a model that takes pixels.
        """
        pixels = resize_and_crop(image, self.preprocessing)
        return pixels if self.pixels else normalize(pixels, self.preprocessing)

    def run(self, batch: NDArray[Any]) -> list[NDArray[Any]]:
        """Run the model on a batch of preprocessed images.

        Returns:
            The outputs, in the order of `outputs`.

        Raises:
            UsageError: the batch has a shape or dtype that the model does not take.
        """
        expected = self.session.get_inputs()[0]
        if expected.shape[:1] == [1] and batch.ndim == 4 and len(batch) != 1:
            raise UsageError(f"expected one image at a time for {self.path}, got a batch of {len(batch)}")
        try:
            found: list[NDArray[Any]] = self.session.run(None, {self._input: batch})
        except Exception as error:
            # ONNX Runtime has one exception class per status code and no public base class.
            raise UsageError(
                f"expected a batch of shape {tuple(expected.shape)} and {expected.type}, got one of "
                f"{batch.shape} and {batch.dtype}: {str(error).splitlines()[0]}"
            ) from error
        return found

    def _run_checked(self, batch: NDArray[Any], dimensions: dict[str, int]) -> dict[str, NDArray[Any]]:
        """Run the model and return its outputs by name.

        Args:
            batch: one preprocessed image.
            dimensions: number of dimensions of the outputs that the model must have. The first is 1 for one
                image, or the number of objects, which all outputs share.

        Raises:
            LightspineError: an output is missing, is not of numbers or has another shape.
        """
        found = dict(zip(self.outputs, self.run(batch), strict=True))
        expected = {len(found[name]) for name in dimensions if name in found and found[name].ndim}
        if len(dimensions) == 1:
            expected.add(1)
        for name, count in dimensions.items():
            array = found.get(name)
            if array is None or array.ndim != count or array.dtype.kind not in "fiu" or len(expected) != 1:
                shape = "none" if array is None else f"{array.dtype} {array.shape}"
                raise LightspineError(
                    f"expected {name} with {count} dimensions from {self.path}, got {shape}"
                )
        return found

    def predict(self, images: Iterable[str | Path], *, topk: int = 5) -> list[Prediction]:
        """Predict the most probable classes of image files.

        Args:
            images: image files.
            topk: number of classes per image; capped at the number of classes.

        Raises:
            UsageError: the model is not a classifier, topk is below 1, or an image is missing or too small.
            LightspineError: an image cannot be read.
        """
        if self.kind != "classifier" or self.outputs != ["logits"]:
            raise UsageError(f"expected a classifier, but {self.path} outputs {', '.join(self.outputs)}")
        if topk < 1:
            raise UsageError(f"expected topk of at least 1, got {topk}")
        return [self._predict_one(Path(path), topk) for path in images]

    def detect(
        self, images: Iterable[str | Path], *, score_threshold: float | None = None
    ) -> list[Detections]:
        """Detect the objects of image files.

        Args:
            images: image files.
            score_threshold: objects of a higher score only; default: that of the file.

        Raises:
            UsageError: the model is not a detector, a score_threshold outside 0 to 1 or below that of the
                file, an image that is missing or too small, or of another size than the file takes.
            LightspineError: an image cannot be read.
        """
        self.check_score_threshold(score_threshold)
        found = (self.detect_pixels(np.asarray(open_image(path)), str(path)) for path in images)
        return [one if score_threshold is None else one.above(score_threshold) for one in found]

    def segment(self, images: Iterable[str | Path]) -> list[NDArray[np.int64]]:
        """Predict the class of every pixel of image files, at the size of the images.

        Args:
            images: image files.

        Returns:
            The index of the class of each pixel, int64 (H, W), for each image.

        Raises:
            UsageError: the model is not a segmenter that returns classes, or an image is missing, too small,
                or of another size than the file takes.
            LightspineError: an image cannot be read.
        """
        if self.outputs != ["classes"]:
            raise UsageError(
                f"expected a segmenter that returns classes, but {self.path} outputs "
                f"{', '.join(self.outputs)}"
            )
        found = []
        for path in images:
            pixels = np.asarray(open_image(path))
            self._check_size(pixels.shape[:2], str(path))
            batch = pixels[None] if self.pixels else normalize(pixels[None], self.preprocessing)
            found.append(self._run_checked(batch, {"classes": 3})["classes"][0])
        return found

    def check_score_threshold(self, score_threshold: float | None) -> None:
        """Check that the model is a detector whose detections include those above a score.

        Raises:
            UsageError: it is not.
        """
        if self.detection is None:
            raise UsageError(f"expected a detector, but {self.path} outputs {', '.join(self.outputs)}")
        if score_threshold is None:
            return
        least = self.detection.score_threshold
        if not 0 <= score_threshold <= 1:
            raise UsageError(f"expected a score_threshold from 0 to 1, got {score_threshold}")
        if score_threshold < least:
            raise UsageError(
                f"expected a score_threshold of at least {least:g}, with which {self.path} was exported, got "
                f"{score_threshold}"
            )

    def detect_pixels(self, pixels: NDArray[np.uint8], name: str = "the image") -> Detections:
        """Detect the objects of one image.

        Args:
            pixels: 8-bit RGB, (H, W, 3).
            name: name of the image in error messages.

        Raises:
            UsageError: the model is not a detector, or takes images of another size.
        """
        self.check_score_threshold(None)
        assert self.detection is not None
        height, width = pixels.shape[:2]
        size = (height, width) if self.pixels else resized_size(height, width, self.detection)
        self._check_size(size, name)
        if self.pixels:
            batch: NDArray[Any] = pixels[None]
        else:
            batch = normalize(resize_pixels(pixels, self.detection)[None], self.preprocessing)
        found = self._run_checked(batch, {"boxes": 2, "scores": 1, "labels": 1})
        boxes, masks = found["boxes"], found.get("masks")
        if size != (height, width):
            ratios = np.array([width, height], np.float32) / np.array([size[1], size[0]], np.float32)
            boxes = boxes * np.tile(ratios, 2)
            masks = None if masks is None else resize_masks(masks, height, width)
        return Detections(
            boxes=boxes,
            scores=found["scores"],
            labels=found["labels"],
            names=[self._class_name(label) for label in found["labels"].tolist()],
            masks=masks,
        )

    def _class_name(self, label: int) -> str:
        names = self.class_names or []
        return names[label - 1] if 1 <= label <= len(names) else str(label - 1)

    def _check_size(self, size: tuple[int, ...], name: str) -> None:
        """Check that a file with a fixed size takes an image."""
        shape = self.session.get_inputs()[0].shape
        fixed = tuple(shape[1:3] if self.pixels else shape[2:])
        if any(isinstance(side, int) and side != found for side, found in zip(fixed, size, strict=True)):
            raise UsageError(
                f"expected an image of {fixed[0]}x{fixed[1]} px, the size for which {self.path} was "
                f"exported, but {name} has {size[0]}x{size[1]} px{'' if self.pixels else ' after resizing'}"
            )

    def _predict_one(self, path: Path, topk: int) -> Prediction:
        batch = self.preprocess(open_image(path))[None]
        logits = self._run_checked(batch, {"logits": 2})["logits"][0].astype(np.float64)
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        names = [str(i) for i in range(len(probabilities))] if self.class_names is None else self.class_names
        if len(names) != len(probabilities):
            raise LightspineError(
                f"expected {len(probabilities)} class names in {self.path}, found {len(names)}"
            )
        best = np.argsort(-probabilities, kind="stable")[:topk]
        return Prediction(path, [ClassScore(names[i], float(probabilities[i])) for i in best])


def predict(
    path: str | Path, images: Iterable[str | Path], *, topk: int = 5, threads: int | None = None
) -> list[Prediction]:
    """Predict the most probable classes of image files with an exported classifier.

    For the arguments see `OnnxModel` and `OnnxModel.predict`.
    """
    return OnnxModel(path, threads=threads).predict(images, topk=topk)


def _describe_session(
    session: "onnxruntime.InferenceSession | ScanSession", path: str
) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the metadata and the names of the outputs and inputs, which need not be UTF-8 in the file."""
    try:
        outputs, inputs = session.get_outputs(), session.get_inputs()
        # Names of dimensions are read here so that later uses cannot fail.
        for value in (*outputs, *inputs):
            value.shape  # noqa: B018
        return (
            session.get_modelmeta().custom_metadata_map,
            [value.name for value in outputs],
            [value.name for value in inputs],
        )
    except UnicodeDecodeError as error:
        raise LightspineError(f"{path} has damaged metadata: {error}") from error


def _check_types(path: str, class_names: Any, pixels: Any) -> None:
    is_list = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    is_printable = not is_list or all(map(_is_text, class_names))
    if not (class_names is None or is_list) or not isinstance(pixels, bool) or not is_printable:
        raise LightspineError(
            f"{path} has damaged metadata: expected a list of class names and whether it takes pixels"
        )


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _create_session(
    path: Path, threads: int | None, compiled_scans: bool | None
) -> "onnxruntime.InferenceSession | ScanSession":
    if not path.is_file():
        raise UsageError(f"expected an exported .onnx file, but {path} does not exist")
    if not path.stat().st_size:
        raise LightspineError(f"{path} is empty: expected an exported .onnx file")
    if compiled_scans is not False:
        session = _compiled_session(path, threads, required=compiled_scans is True)
        if session is not None:
            return session
    options = onnxruntime.SessionOptions()
    # 3 = errors: the warnings only concern how the graph could be optimized.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if missing := re.search(r"lightspine:(\w+)\(-1\) is not a registered function", str(error)):
            raise LightspineError(
                f"expected the body of the function {missing[1]} in {path}, which calls it, but the file has "
                "none: export the model again"
            ) from error
        raise LightspineError(f"ONNX Runtime cannot run {path}: {str(error).splitlines()[0]}") from error


def _compiled_session(path: Path, threads: int | None, *, required: bool) -> "ScanSession | None":
    """Open a file with compiled scans; `None` where they are not required and cannot be used."""
    if not _names_scans(path):
        if required:
            raise UsageError(
                f"expected scans as functions of the file for compiled_scans, but {path} has none"
            )
        return None
    missing = [name for name in _FAST_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} cannot be imported: pip install 'lightspine-runtime[fast]'"
        level = logging.INFO
    else:
        from lightspine_runtime.scan_session import CannotSplitError, ScanSession

        try:
            return ScanSession(path, threads)
        except CannotSplitError as error:
            reason, level = str(error), logging.WARNING
    if required:
        raise UsageError(f"expected a file and packages for compiled_scans, but with {path} {reason}")
    log.log(level, "ONNX Runtime computes the scans of %s, not compiled kernels: %s", path, reason)
    return None


def _names_scans(path: Path) -> bool:
    """Return whether the bytes of a file contain the name of a scan function; saves parsing most files."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(name) >= 0 for name in (b"GroupedScan", b"SequenceScan"))
