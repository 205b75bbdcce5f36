"""Stages of a timm model: their modules, and their outputs as maps."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.models.vim import Vim, patches_of

MAX_STAGES = 6
"""Up to this many stages are all shown; of a longer list, `_NUM_SELECTED` evenly spaced ones."""

_NUM_SELECTED = 4


@dataclass(frozen=True)
class Stage:
    """One entry of a model's `feature_info`: its index, the name of its module and its number of channels."""

    index: int
    module: str
    channels: int


@dataclass(frozen=True)
class TokenGrid:
    """Positions of an image's patches in a sequence of tokens.

    Attributes:
        height: number of rows of patches.
        width: number of columns of patches.
        patches: position of each patch in the sequence, row by row, (height * width,).
        others: positions of the other tokens, for example the class token.
    """

    height: int
    width: int
    patches: Tensor
    others: Tensor


def list_stages(network: nn.Module) -> list[Stage]:
    """List the stages of a model.

    Raises:
        UsageError: the model has no `feature_info` with module names.
    """
    info: Any = getattr(network, "feature_info", None)
    entries = info if isinstance(info, list) else info.get_dicts() if hasattr(info, "get_dicts") else []
    modules = dict(network.named_modules())
    stages = [
        Stage(i, entry["module"], entry["num_chs"])
        for i, entry in enumerate(entries)
        if entry.get("module") in modules
    ]
    if not stages:
        raise UsageError(f"expected a model with stages in its feature_info, got {type(network).__name__}")
    return stages


def select_stages(network: nn.Module, stage: int | None) -> list[Stage]:
    """Return the stage with an index, or for `None` all stages (four evenly spaced ones of a long list).

    Raises:
        UsageError: no stage has this index.
    """
    stages = list_stages(network)
    if stage is not None:
        return [get_stage(stages, stage)]
    if len(stages) <= MAX_STAGES:
        return stages
    return [stages[math.ceil(len(stages) * (i + 1) / _NUM_SELECTED) - 1] for i in range(_NUM_SELECTED)]


def select_layers(network: nn.Module, layers: Iterable[str], stage: int | None) -> list[str]:
    """Return the layers inside a stage, or for `None` the last layer of each stage.

    Args:
        network: a model with stages.
        layers: names of modules.
        stage: index of a stage in the model's `feature_info`.

    Raises:
        UsageError: no stage has this index.
    """
    stages, names = list_stages(network), list(layers)
    by_stage = {each.index: [n for n in names if n.startswith(f"{each.module}.")] for each in stages}
    if stage is None:
        return [inside[-1] for inside in by_stage.values() if inside]
    return by_stage[get_stage(stages, stage).index]


def get_stage(stages: Sequence[Stage], stage: int) -> Stage:
    """Return the stage with an index.

    Raises:
        UsageError: no stage has this index.
    """
    found = [candidate for candidate in stages if candidate.index == stage]
    if not found:
        numbers = ", ".join(str(candidate.index) for candidate in stages)
        raise UsageError(f"expected a stage among {numbers}, got {stage}")
    return found[0]


@contextmanager
def record_outputs(network: nn.Module, modules: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of modules while the network runs, without detaching them.

    Args:
        network: the network.
        modules: names of its submodules.

    Yields:
        A dictionary that is filled by module name.
    """
    outputs: dict[str, Tensor] = {}
    hooks = []
    for name in modules:

        def record(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            # EfficientViM's stages return their map and a hidden state.
            outputs[name] = output[0] if isinstance(output, tuple) else output

        hooks.append(network.get_submodule(name).register_forward_hook(record))
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def as_map(network: nn.Module, output: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Convert the output of a stage, or its gradient, to a map (B, C, h, w), without prefix tokens.

    Args:
        network: the network.
        output: (B, C, h, w), (B, h, w, C) or tokens (B, N, C).
        channels: C.
        size: height and width of the image in pixels.

    Raises:
        UsageError: the output is not a map, or its tokens do not form a grid.
    """
    if output.dim() == 4 and output.shape[1] == channels:
        return output
    if output.dim() == 4 and output.shape[3] == channels:
        return output.permute(0, 3, 1, 2)
    if output.dim() != 3 or output.shape[2] != channels:
        raise UsageError(
            f"expected a stage whose output is a map or tokens with {channels} channels, got the shape "
            f"{tuple(output.shape)}"
        )
    grid = token_grid(network, output.shape[1], size)
    tokens = output[:, grid.patches.to(output.device)]
    return tokens.transpose(1, 2).unflatten(2, (grid.height, grid.width))


def token_grid(network: nn.Module, count: int, size: tuple[int, int]) -> TokenGrid:
    """Find the grid of patches in a sequence of tokens.

    Of all grids with this number of patches it is the one whose aspect ratio is closest to that of the image.

    Args:
        network: the network.
        count: number of tokens.
        size: height and width of the image in pixels.

    Raises:
        UsageError: no grid has about the aspect ratio of the image, for example because tokens were pruned.
    """
    places = torch.arange(count)
    if isinstance(network, Vim):
        patches = patches_of(places.view(1, -1, 1), network.class_token).flatten()
    else:
        patches = places[int(getattr(network, "num_prefix_tokens", 0)) :]
    number, ratio = len(patches), size[0] / size[1]
    heights = [h for h in range(1, number + 1) if number % h == 0]
    height = min(heights, key=lambda h: abs(math.log(h * h / number / ratio)))
    width = number // height
    # Rounding to whole patches changes each side by less than one patch.
    if not (height - 1) / (width + 1) <= ratio <= (height + 1) / max(width - 1, 1e-9):
        raise UsageError(
            f"expected one token per patch, but {number} tokens do not form a grid with the aspect ratio of "
            f"{size[0]}x{size[1]} px"
        )
    others = places[~torch.isin(places, patches)]
    return TokenGrid(height, width, patches, others)
