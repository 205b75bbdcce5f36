"""Numerical comparison of an exported file, run in ONNX Runtime, with PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspine.errors import LightspineError

DEFAULT_SHAPES = ((1, 224, 224), (3, 192, 256), (1, 97, 161))
"""(batch, height, width) at which a file with dynamic sizes is compared."""

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8-dynamic": 0.5, "int8-static": 0.5}
"""Maximum relative difference by precision; see `Difference`.

The int8 tolerances only detect broken files: 8-bit weights and activations change the outputs of a network
with random weights by tens of percent. Measure the accuracy of a quantized model with `lightspine evaluate`.
"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference between the outputs of a file and of PyTorch for one batch.

    Attributes:
        shape: (batch, height, width).
        largest: maximum absolute difference over all outputs.
        relative: ||difference|| / ||PyTorch's output|| (Euclidean norms), maximum over the outputs.
    """

    shape: tuple[int, int, int]
    largest: float
    relative: float


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Summary of an exported file.

    Attributes:
        path: the file.
        bytes: size of the file.
        weight_bytes: size of the model's parameters in PyTorch.
        nodes: number of operators in the graph.
        differences: differences from PyTorch, one per batch.
        tolerance: maximum relative difference.
    """

    path: Path
    bytes: int
    weight_bytes: int
    nodes: int
    differences: list[Difference] = field(default_factory=list)
    tolerance: float = 0.0


def open_session(path: str | Path | bytes, threads: int | None = None) -> Any:
    """Create an `onnxruntime.InferenceSession` on the CPU.

    Raises:
        LightspineError: ONNX Runtime cannot load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        # Idle threads would otherwise spin and slow down whatever runs next in this process.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    content = path if isinstance(path, bytes) else str(path)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LightspineError(f"ONNX Runtime cannot run the exported file: {error}") from error


def random_batches(
    channels: int, shapes: Sequence[tuple[int, int, int]], *, pixels: bool = False
) -> list[Tensor]:
    """Create random images from a fixed seed.

    Args:
        channels: number of channels.
        shapes: (batch, height, width) of each batch.
        pixels: create 8-bit pixels (B, H, W, C) instead of normalized images (B, C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    if pixels:
        return [
            torch.randint(0, 256, (*shape, channels), dtype=torch.uint8, generator=generator)
            for shape in shapes
        ]
    return [torch.randn(count, channels, *size, generator=generator) for count, *size in shapes]


def session_function(session: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Wrap a session of ONNX Runtime as a function from a tensor to a tuple of tensors."""
    name = session.get_inputs()[0].name
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {name: images.numpy()})))


def compare(
    network: Callable[[Tensor], Any], other: Callable[[Tensor], Any], batches: Sequence[Tensor]
) -> list[Difference]:
    """Compare the outputs of two functions for the same images.

    Args:
        network: the reference.
        other: the function to compare with it.
        batches: the inputs.

    Raises:
        LightspineError: the outputs have different shapes.
    """
    found = []
    for images in batches:
        with torch.inference_mode():
            expected, actual = _as_arrays(network(images)), _as_arrays(other(images))
        pairs = list(zip(expected, actual, strict=True))
        sides = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        found.append(
            Difference(
                shape=(len(images), sides[0], sides[1]),
                relative=max(_relative_difference(mine, theirs) for mine, theirs in pairs),
                largest=max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs),
            )
        )
    return found


def check_differences(differences: Sequence[Difference], tolerance: float, name: str) -> None:
    """Check that all differences are within a tolerance.

    Raises:
        LightspineError: one is larger, or not a number.
    """
    worst = max(differences, key=lambda found: found.relative)
    if not worst.relative <= tolerance:
        raise LightspineError(
            f"the exported {name} differs from PyTorch by {worst.relative:.1e} at {worst.shape}, more than "
            f"{tolerance:.0e}: no file was written"
        )


def _as_arrays(outputs: Any) -> list[np.ndarray]:
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output.double().numpy() for output in found]


def _relative_difference(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        raise LightspineError(
            f"the exported file has an output of shape {actual.shape}, PyTorch one of {expected.shape}"
        )
    difference = float(np.linalg.norm((actual - expected).ravel()))
    # NaN counts as an infinite difference.
    return (
        difference / max(float(np.linalg.norm(expected.ravel())), 1e-30)
        if np.isfinite(difference)
        else float("inf")
    )
