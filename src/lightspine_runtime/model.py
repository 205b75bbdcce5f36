"""An exported model, run by ONNX Runtime."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightspine_runtime.errors import LightspineError, UsageError
from lightspine_runtime.images import open_image
from lightspine_runtime.preprocessing import Preparation, crop_image, normalise

_PREFIX = "lightspine."


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


class OnnxModel:
    """A file that `lightspine export` wrote.

    Attributes:
        path: the file.
        name: of the model.
        kind: "classifier", "features", "pyramid" or "segmenter".
        class_names: one per class; `None` where the file does not tell.
        preparation: how its images are prepared.
        pixels: whether it takes 8-bit pixels (B, H, W, 3) in place of normalised images (B, 3, H, W).
        outputs: names of what it gives.
        about: all that the file says about itself, text by name: version, commit, precision, source...

    Args:
        path: the file.
        threads: of ONNX Runtime; as many as there are cores by default.

    Raises:
        UsageError: no such file, or one that lightspine did not write.
        LightspineError: ONNX Runtime cannot run the file.

    Examples:
        >>> from lightspine_runtime import OnnxModel
        >>> model = OnnxModel("model.onnx")  # doctest: +SKIP
        >>> model.predict(["seven.png"])[0].classes[0]  # doctest: +SKIP
        ClassScore(name='7', probability=0.98)
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self.session = _open(self.path, threads)
        entries = self.session.get_modelmeta().custom_metadata_map
        self.about = {
            key.removeprefix(_PREFIX): value for key, value in entries.items() if key.startswith(_PREFIX)
        }
        if "model" not in self.about or "preprocessing" not in self.about:
            raise UsageError(
                f"expected a file that `lightspine export` wrote, but {path} does not say how its images are "
                "prepared"
            )
        try:
            preprocessing = json.loads(self.about["preprocessing"])
            self.class_names: list[str] | None = json.loads(self.about.get("class_names", "null"))
            self.pixels: bool = json.loads(self.about.get("pixels", "false"))
        except json.JSONDecodeError as error:
            raise LightspineError(f"{path} has damaged metadata: {error}") from error
        self.name, self.kind = self.about["model"], self.about.get("kind", "classifier")
        self.preprocessing: dict[str, Any] = preprocessing
        self.preparation = Preparation.from_mapping(preprocessing, str(path))
        self.outputs = [value.name for value in self.session.get_outputs()]
        self._input = self.session.get_inputs()[0].name

    def prepare(self, image: Image.Image) -> NDArray[Any]:
        """Return what the model takes of an RGB image: (3, H, W), or pixels (H, W, 3) where it normalises."""
        pixels = crop_image(image, self.preparation)
        return pixels if self.pixels else normalise(pixels, self.preparation)

    def run(self, batch: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the outputs for a batch of prepared images.

        Raises:
            UsageError: a batch of another shape or type than the model takes.
        """
        try:
            found: list[NDArray[Any]] = self.session.run(None, {self._input: batch})
        except Exception as error:
            # ONNX Runtime has an exception of its own for each of its status codes, in no public base class.
            expected = self.session.get_inputs()[0]
            raise UsageError(
                f"expected a batch of shape {tuple(expected.shape)} and {expected.type}, got one of "
                f"{batch.shape} and {batch.dtype}: {str(error).splitlines()[0]}"
            ) from error
        return found

    def predict(self, images: Iterable[str | Path], *, topk: int = 5) -> list[Prediction]:
        """Tell the likeliest classes of image files.

        Args:
            images: image files.
            topk: how many classes to tell; at most all.

        Raises:
            UsageError: the model is no classifier, topk below 1, a missing or too small image.
            LightspineError: an image cannot be read.
        """
        if self.kind != "classifier" or self.outputs != ["logits"]:
            raise UsageError(
                f"expected a classifier to predict with, {self.path} gives {', '.join(self.outputs)}"
            )
        if topk < 1:
            raise UsageError(f"expected topk of at least 1, got {topk}")
        return [self._predict(Path(path), topk) for path in images]

    def _predict(self, path: Path, topk: int) -> Prediction:
        logits = self.run(self.prepare(open_image(path))[None])[0][0].astype(np.float64)
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        names = self.class_names or [str(i) for i in range(len(probabilities))]
        best = np.argsort(-probabilities, kind="stable")[:topk]
        return Prediction(path, [ClassScore(names[i], float(probabilities[i])) for i in best])


def predict(
    path: str | Path, images: Iterable[str | Path], *, topk: int = 5, threads: int | None = None
) -> list[Prediction]:
    """Tell the likeliest classes of image files with an exported classifier; see `OnnxModel.predict`."""
    return OnnxModel(path, threads=threads).predict(images, topk=topk)


def _open(path: Path, threads: int | None) -> Any:
    if not path.is_file():
        raise UsageError(f"expected an exported .onnx file, but {path} does not exist")
    try:
        # Here, because `lightspine` works without it and loads this package for its errors.
        import onnxruntime
    except ModuleNotFoundError as error:
        raise LightspineError(
            f"to run {path} needs onnxruntime, which is not installed: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    # Above warnings, which are about how a graph could be written better.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LightspineError(f"ONNX Runtime cannot run {path}: {str(error).splitlines()[0]}") from error
