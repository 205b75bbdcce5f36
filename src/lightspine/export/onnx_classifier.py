"""An exported classifier as a PyTorch module, for evaluation and prediction."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import ModelMetadata

if TYPE_CHECKING:
    from lightspine_runtime import OnnxModel


class OnnxClassifier(nn.Module):
    """A classifier that ONNX Runtime runs.

    Args:
        model: the opened file.

    Shape:
        Normalized images `(B, C, H, W)`, of the sizes that the file takes, to logits `(B, classes)`.

    Raises:
        UsageError: the file is not a classifier, or takes pixels instead of normalized images, or the module
            is moved to a device or dtype other than cpu and float32.
    """

    def __init__(self, model: "OnnxModel"):
        super().__init__()
        if model.kind != "classifier" or model.outputs != ["logits"]:
            raise UsageError(
                f"expected an exported classifier, but {model.path} outputs {', '.join(model.outputs)}"
            )
        if model.pixels:
            raise UsageError(
                f"expected a file that takes normalized images, but {model.path} takes pixels and normalizes "
                "them itself"
            )
        self.model = model
        shape = model.session.get_outputs()[0].shape
        self.num_classes = int(shape[-1])
        self.default_cfg = self.pretrained_cfg = json.loads(model.metadata["preprocessing"])
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

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a batch of images."""
        with _runtime_errors_as_own():
            return torch.from_numpy(self.model.run(x.detach().cpu().contiguous().numpy())[0])


def is_onnx_file(path: str | Path) -> bool:
    """Return whether the name of a file ends in .onnx."""
    return Path(path).suffix == ".onnx"


def load_onnx(path: str | Path, *, threads: int | None = None) -> tuple[OnnxClassifier, ModelMetadata]:
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
    try:
        from lightspine_runtime import OnnxModel
    except ModuleNotFoundError as error:
        raise UsageError(
            f"running {path} needs the package lightspine-runtime, but {error.name} is not installed: "
            "pip install lightspine-runtime, or in a checkout pip install ./runtime"
        ) from error
    with _runtime_errors_as_own():
        model = OnnxModel(path, threads=threads)
    saved = ModelMetadata(
        model.name,
        class_names=model.class_names,
        preprocessing=json.loads(model.metadata["preprocessing"]),
        metadata={
            key: model.metadata[key] for key in ("version", "commit", "precision") if key in model.metadata
        },
    )
    return OnnxClassifier(model), saved


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
