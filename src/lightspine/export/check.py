"""Run an exported file in ONNX Runtime beside PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightspine.errors import LightspineError

CHECKED = ((1, 224, 224), (3, 192, 256), (1, 97, 161))
"""(images, height, width) that a file with free sizes is compared at."""

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8-dynamic": 0.5, "int8-static": 0.5}
"""Largest relative difference, by precision; see `Difference`.

8-bit weights and activations change the outputs of a network with random weights by some tens of percent;
what they cost is told by the accuracy on images (`lightspine evaluate`). Here only a broken file is found.
"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a file's outputs are from PyTorch's.

    Attributes:
        shape: (images, height, width).
        largest: largest difference of any output.
        relative: the largest, over the outputs, of |difference| / |PyTorch's output| in Euclidean norm.
    """

    shape: tuple[int, int, int]
    largest: float
    relative: float


def open_session(path: str | Path | bytes, threads: int | None = None) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU.

    Raises:
        LightspineError: ONNX Runtime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        # Threads that wait for more work on a core of their own would slow down whatever is called next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    content = path if isinstance(path, bytes) else str(path)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LightspineError(f"ONNX Runtime cannot run the exported file: {error}") from error


def random_batches(
    channels: int, shapes: Sequence[tuple[int, int, int]], *, pixels: bool = False
) -> list[Tensor]:
    """Return random images, always the same.

    Args:
        channels: of the images.
        shapes: (images, height, width) of each batch.
        pixels: give 8-bit pixels (B, H, W, C) in place of normalised images (B, C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    if pixels:
        return [
            torch.randint(0, 256, (*shape, channels), dtype=torch.uint8, generator=generator)
            for shape in shapes
        ]
    return [torch.randn(count, channels, *size, generator=generator) for count, *size in shapes]


def session_function(session: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a session of ONNX Runtime as a function of tensors."""
    name = session.get_inputs()[0].name
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {name: images.numpy()})))


def compare(
    network: Callable[[Tensor], Any], other: Callable[[Tensor], Any], batches: Sequence[Tensor]
) -> list[Difference]:
    """Run two functions on the same images.

    Args:
        network: what is right.
        other: what is compared with it.
        batches: what both take.

    Raises:
        LightspineError: outputs of another shape.
    """
    found = []
    for images in batches:
        with torch.inference_mode():
            expected, actual = _values(network(images)), _values(other(images))
        pairs = list(zip(expected, actual, strict=True))
        sides = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        found.append(
            Difference(
                shape=(len(images), sides[0], sides[1]),
                relative=max(_relative(mine, theirs) for mine, theirs in pairs),
                largest=max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs),
            )
        )
    return found


def _values(outputs: Any) -> list[np.ndarray]:
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output.double().numpy() for output in found]


def _relative(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        raise LightspineError(
            f"the exported file gives an output of shape {actual.shape}, PyTorch one of {expected.shape}"
        )
    difference = float(np.linalg.norm((actual - expected).ravel()))
    # Not a number is no agreement either.
    return (
        difference / max(float(np.linalg.norm(expected.ravel())), 1e-30)
        if np.isfinite(difference)
        else float("inf")
    )
