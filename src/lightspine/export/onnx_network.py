"""An exported classifier or segmenter as a PyTorch module, for evaluation and prediction."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.dense import NetworkMetadata
from lightspine.dense.checkpoint import read_network_metadata
from lightspine.errors import LightspineError, UsageError
from lightspine.export.metadata import METADATA_PREFIX
from lightspine.models.checkpoint import Checkpoint, ModelMetadata, read_model_metadata

if TYPE_CHECKING:
    from lightspine_runtime import OnnxModel

_KINDS = {
    "pyramid": "the backbone and feature pyramid of a detector, without its boxes",
    "features": "a backbone without a classifier",
}


class OnnxNetwork(nn.Module):
    """A classifier or segmenter that ONNX Runtime runs.

    Args:
        model: the opened file.

    Shape:
        Normalized images `(B, C, H, W)`, of the sizes that the file takes, to logits `(B, classes)` or, for a
        segmenter, `(B, classes, H, W)`.

    Raises:
        UsageError: the file has no logits, or takes pixels instead of normalized images, or the module is
            moved to a device or dtype other than cpu and float32.
    """

    def __init__(self, model: "OnnxModel"):
        super().__init__()
        if model.outputs != ["logits"]:
            raise UsageError(
                f"expected an exported classifier or segmenter, but {model.path} holds "
                f"{_KINDS.get(model.kind, 'no classifier')}; pass the checkpoint that it was exported from"
            )
        if model.pixels:
            raise UsageError(
                f"expected a file that takes normalized images, but {model.path} takes pixels and normalizes "
                "them itself"
            )
        self.model = model
        shape = model.session.get_outputs()[0].shape or []
        if len(shape) < 2 or not isinstance(shape[1], int) or shape[1] < 1:
            raise LightspineError(f"expected logits of shape (batch, classes) in {model.path}, found {shape}")
        self.num_classes = shape[1]
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
    model = _open(path, threads)
    if model.kind == "segmenter":
        raise UsageError(f"expected an exported classifier, but {path} holds a segmenter")
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
    model = _open(path, threads)
    if model.kind == "classifier":
        raise UsageError(f"expected an exported segmenter, but {path} holds a classifier")
    network, checkpoint = OnnxNetwork(model), _as_checkpoint(model)
    if not checkpoint.is_dense:
        raise UsageError(
            f"expected a segmenter that `lightspine export` wrote from a checkpoint, but {path} has no "
            "metadata of one"
        )
    return network, read_network_metadata(checkpoint)


def read_onnx_metadata(path: str | Path) -> Checkpoint:
    """Return the metadata of an exported file as a checkpoint without tensors; raises as `load_onnx` does."""
    return _as_checkpoint(_open(path, None))


def _as_checkpoint(model: "OnnxModel") -> Checkpoint:
    return Checkpoint(model.path, {}, {METADATA_PREFIX + key: value for key, value in model.metadata.items()})


def _open(path: str | Path, threads: int | None) -> "OnnxModel":
    try:
        from lightspine_runtime import OnnxModel
    except ModuleNotFoundError as error:
        raise UsageError(
            f"running {path} needs the package lightspine-runtime, but {error.name} is not installed: "
            "pip install lightspine-runtime, or in a checkout pip install ./runtime"
        ) from error
    with _runtime_errors_as_own():
        return OnnxModel(path, threads=threads)


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
