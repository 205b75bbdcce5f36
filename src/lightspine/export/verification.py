"""Numerical comparison of an exported file, run in ONNX Runtime, with PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from lightspine.errors import LightspineError

DEFAULT_SHAPES = ((1, 224, 224), (3, 192, 256), (1, 97, 161))
"""(batch, height, width) at which a file with dynamic sizes is compared."""

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8-dynamic": 0.5, "int8-static": 0.5}
"""Maximum relative difference by precision; see `Difference`.

The int8 tolerances only detect broken files: 8-bit weights and activations change the outputs of a network
with random weights by tens of percent. Measure the accuracy of a quantized model with `lightspine evaluate`.
"""

RESIZED_TOLERANCE = 5e-4
"""Minimum of the tolerance for a detector whose file resizes 8-bit images.

A resized pixel close to the middle of two 8-bit values may be rounded to the other one, which changes the
scores of a trained detector by 1e-5 to 1e-4.
"""


@dataclass(frozen=True, kw_only=True)
class DetectionTolerance:
    """When detections of a file correspond to those of PyTorch.

    Attributes:
        overlap: minimum IoU of the boxes.
        score: maximum difference of the scores.
        share: minimum share of PyTorch's detections that have a counterpart.
    """

    overlap: float
    score: float
    share: float


DETECTION_TOLERANCES = {
    "fp32": DetectionTolerance(overlap=0.97, score=5e-3, share=0.9),
    "fp16": DetectionTolerance(overlap=0.9, score=0.05, share=0.5),
    # As for other models, broken files only: one that runs.
    "int8-dynamic": DetectionTolerance(overlap=0.5, score=1.0, share=0.0),
    "int8-static": DetectionTolerance(overlap=0.5, score=1.0, share=0.0),
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference between the outputs of a file and of PyTorch for one batch.

    Attributes:
        shape: (batch, height, width).
        largest: maximum absolute difference over all outputs.
        relative: ||difference|| / ||PyTorch's output|| (Euclidean norms), maximum over the outputs; for a map
            of classes the share of the pixels that differ.
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


def smooth_images(channels: int, sizes: Sequence[tuple[int, int]], *, pixels: bool) -> list[Tensor]:
    """Create random images for a detector, one per (height, width), with structures of 16 pixels.

    In plain noise, a resized pixel is often so close to the border between two 8-bit values that rounding
    errors decide.

    Args:
        channels: number of channels.
        sizes: (height, width) of each image.
        pixels: see `random_batches`.
    """
    coarse = random_batches(channels, [(1, height // 16 + 2, width // 16 + 2) for height, width in sizes])
    images = [
        F.interpolate(image, size=size, mode="bilinear") for image, size in zip(coarse, sizes, strict=True)
    ]
    if not pixels:
        return images
    return [
        (128 + 60 * image).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous() for image in images
    ]


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


def compare_detections(
    network: Callable[[Tensor], tuple[Tensor, ...]],
    other: Callable[[Tensor], tuple[Tensor, ...]],
    images: Sequence[Tensor],
    precision: str,
) -> list[Difference]:
    """Compare the detections of two detectors.

    Detections correspond if they have the same label, nearly the same box and nearly the same score. A few
    need not correspond: NMS may keep either of two boxes whose scores or overlaps differ by rounding only.

    Args:
        network: the reference; returns boxes, scores, labels and possibly masks.
        other: the function to compare with it.
        images: batches of one image.
        precision: of the other, a key of `DETECTION_TOLERANCES`.

    Returns:
        The differences of corresponding boxes and scores.

    Raises:
        LightspineError: too many detections do not correspond.
    """
    tolerance = DETECTION_TOLERANCES[precision]
    found = []
    for image in images:
        with torch.inference_mode():
            expected, actual = network(image), other(image)
        overlap = box_iou(expected[0], actual[0])
        same = (expected[2][:, None] == actual[2]) & (overlap >= tolerance.overlap)
        same &= (expected[1][:, None] - actual[1]).abs() <= tolerance.score
        rows, columns = torch.where(same)
        share = float(same.any(1).float().mean()) if len(expected[0]) else float(len(actual[0]) == 0)
        sides = image.shape[1:3] if image.dtype == torch.uint8 else image.shape[2:]
        if share < tolerance.share:
            raise LightspineError(
                f"the exported detector finds only {share:.0%} of PyTorch's {len(expected[0])} detections in "
                f"a random image of {sides[0]}x{sides[1]} px: no file was written"
            )
        pairs = [
            (values[rows], others[columns]) for values, others in zip(expected[:2], actual[:2], strict=True)
        ]
        found.append(
            Difference(
                shape=(1, sides[0], sides[1]),
                relative=max(_relative_difference(mine.numpy(), theirs.numpy()) for mine, theirs in pairs),
                largest=max(
                    float((mine - theirs).abs().max()) if len(rows) else 0.0 for mine, theirs in pairs
                ),
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
    # Classes stay integers.
    return [(output.double() if output.is_floating_point() else output).numpy() for output in found]


def _relative_difference(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        raise LightspineError(
            f"the exported file has an output of shape {actual.shape}, PyTorch one of {expected.shape}"
        )
    if np.issubdtype(expected.dtype, np.integer):
        return float((actual != expected).mean())
    difference = float(np.linalg.norm((actual - expected).ravel()))
    # NaN counts as an infinite difference.
    return (
        difference / max(float(np.linalg.norm(expected.ravel())), 1e-30)
        if np.isfinite(difference)
        else float("inf")
    )
