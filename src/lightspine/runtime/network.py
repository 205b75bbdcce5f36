"""An exported classifier as a PyTorch module, to score and predict with as with a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.models._saving import SavedModel
from lightspine_runtime.model import OnnxModel


class OnnxNetwork(nn.Module):
    """A classifier that ONNX Runtime runs.

    Args:
        model: the opened file.

    Shape:
        Normalised images `(B, C, H, W)`, of the sizes that the file takes, to logits `(B, classes)`.

    Raises:
        UsageError: the file holds no classifier, or takes pixels that are not normalised, or the module
            is moved to another device or dtype than cpu and float32.
    """

    def __init__(self, model: OnnxModel):
        super().__init__()
        if model.kind != "classifier" or model.outputs != ["logits"]:
            raise UsageError(
                f"expected an exported classifier, {model.path} gives {', '.join(model.outputs)}"
            )
        if model.pixels:
            raise UsageError(
                f"expected a file that takes normalised images, {model.path} normalises them itself"
            )
        self.model = model
        shape = model.session.get_outputs()[0].shape
        self.num_classes = int(shape[-1])
        self.default_cfg = self.pretrained_cfg = dict(model.preprocessing)
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # There is no tensor to move: `to` would silently do nothing.
        moved = fn(torch.empty(0))
        if (moved.device.type, moved.dtype) != ("cpu", torch.float32):
            raise UsageError(
                f"expected the exported file {self.model.path} on the device cpu and in torch.float32, where "
                f"ONNX Runtime runs it, got {moved.device} and {moved.dtype}"
            )
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return torch.from_numpy(self.model.run(x.detach().cpu().contiguous().numpy())[0])


def is_onnx_file(path: str | Path) -> bool:
    """Tell by its name whether a file is an exported model."""
    return Path(path).suffix == ".onnx"


def load_onnx(path: str | Path, *, threads: int | None = None) -> tuple[OnnxNetwork, SavedModel]:
    """Open an exported classifier.

    Args:
        path: the file.
        threads: of ONNX Runtime.

    Returns:
        The module, and what is known about it, as `lightspine.load_model` gives for a checkpoint.

    Raises:
        UsageError: no such file, or one that lightspine did not write or that is no classifier.
        LightspineError: ONNX Runtime cannot run it.
    """
    model = OnnxModel(path, threads=threads)
    saved = SavedModel(
        model.name,
        class_names=model.class_names,
        preprocessing=dict(model.preprocessing),
        metadata={key: model.about[key] for key in ("version", "commit", "precision") if key in model.about},
    )
    return OnnxNetwork(model), saved
