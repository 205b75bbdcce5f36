"""Validation of constructor arguments that several model families share."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightspine.errors import UsageError


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument has one of its allowed values.

    Raises:
        UsageError: it has another value; the message lists the allowed ones.
    """
    if value not in choices:
        allowed = ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
        raise UsageError(f"{name} must be {allowed}, got {value!r}")


def check_global_pool(global_pool: str, num_classes: int) -> None:
    """Check that the pooling of a classifier is "avg" or, without classes, "".

    Raises:
        UsageError: another pooling, or classes without pooling.
    """
    if global_pool not in ("avg", ""):
        raise UsageError(f"global_pool must be 'avg' or '', got {global_pool!r}")
    if num_classes and not global_pool:
        raise UsageError(f"a classifier needs global_pool='avg', got '' with num_classes={num_classes}")


def stem_strides(stem_stride: int, convolutions: int) -> tuple[int, ...]:
    """Return the stride of each convolution of a stem, all of which are 2 in the published models.

    A smaller stem stride keeps the shape of every weight: the first convolutions get stride 1, the others 2.
    The first ones have the fewest channels, so that the larger maps there cost the least.

    Args:
        stem_stride: product of the strides.
        convolutions: number of convolutions.

    Raises:
        UsageError: `stem_stride` is not a power of two, or too large for the number of convolutions.
    """
    choices = [2**count for count in range(convolutions + 1)]
    check_stem_stride(stem_stride, choices)
    halvings = choices.index(stem_stride)
    return (1,) * (convolutions - halvings) + (2,) * halvings


def check_stem_stride(stem_stride: int, choices: list[int]) -> None:
    """Check that a stem offers a stride.

    Raises:
        UsageError: `stem_stride` is not among the choices.
    """
    if stem_stride not in choices:
        *first, last = map(str, choices)
        allowed = f"{', '.join(first)} or {last}" if first else last
        raise UsageError(f"stem_stride must be {allowed}, got {stem_stride}")


def check_images(images: Tensor) -> None:
    """Check that a model receives a batch of images in a floating dtype.

    Raises:
        UsageError: another number of axes, or whole numbers.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return
    _check_images(images)


@torch.jit.unused
def _check_images(images: Any) -> None:
    if isinstance(images, torch.fx.Proxy):
        return
    if images.dim() != 4:
        hint = ": add a batch axis with images[None]" if images.dim() == 3 else ""
        raise UsageError(f"expected images of shape (B, C, H, W), received {tuple(images.shape)}{hint}")
    if not images.dtype.is_floating_point:
        raise UsageError(
            "expected images of a floating dtype, scaled and normalized as "
            f"timm.data.create_transform does, received {images.dtype}"
        )


def check_batch_statistics(model: Any, images: Any) -> None:
    """Check that BatchNorm in training can compute statistics of the last map of a model; not for scripts.

    Raises:
        UsageError: a single image whose last map has a single pixel.
    """
    traced = isinstance(images, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or torch.compiler.is_compiling() or not model.training or images.shape[0] != 1:
        return
    height, width = images.shape[2:]
    stride = model.feature_info[-1]["reduction"]
    if max(height, width) <= stride and any(
        isinstance(m, _BatchNorm) and m.training for m in model.modules()
    ):
        raise UsageError(
            f"training with BatchNorm needs more than one value per channel: expected at least two images or "
            f"more than {stride} pixels, or a smaller stem_stride, received one image of {width} x {height}"
        )
