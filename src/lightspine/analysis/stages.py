"""The stages of any timm model: their modules, and their outputs as maps."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.models.vim import Vim, patches_of

MOST_STAGES = 6
"""A model with more stages, such as a row of like blocks, is shown at four of them."""

_SHOWN_OF_MANY = 4


@dataclass(frozen=True)
class Stage:
    """One entry of a model's `feature_info`: its number, the name of its module and its channels."""

    index: int
    module: str
    channels: int


@dataclass(frozen=True)
class TokenGrid:
    """Where the patches of an image stand in a sequence of tokens.

    Attributes:
        height: rows of patches.
        width: columns of patches.
        patches: place of each patch in the sequence, row by row, (height * width,).
        others: places of the tokens that are no patch, such as the class token.
    """

    height: int
    width: int
    patches: Tensor
    others: Tensor


def list_stages(network: nn.Module) -> list[Stage]:
    """Return the stages of a model.

    Raises:
        UsageError: the model has no `feature_info` with the names of its modules.
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


def choose_stages(network: nn.Module, stage: int | None) -> list[Stage]:
    """Return one stage, or with `None` all; of more than `MOST_STAGES` four that are evenly spread.

    Raises:
        UsageError: no stage has this number.
    """
    stages = list_stages(network)
    if stage is not None:
        return [pick_stage(stages, stage)]
    if len(stages) <= MOST_STAGES:
        return stages
    return [stages[math.ceil(len(stages) * (i + 1) / _SHOWN_OF_MANY) - 1] for i in range(_SHOWN_OF_MANY)]


def choose_layers(network: nn.Module, layers: Iterable[str], stage: int | None) -> list[str]:
    """Return those of some layers that lie in one stage, or with `None` the last one of every stage.

    Args:
        network: a model with stages.
        layers: names of modules.
        stage: number in the model's `feature_info`.

    Raises:
        UsageError: no stage has this number.
    """
    stages, names = list_stages(network), list(layers)
    by_stage = {each.index: [n for n in names if n.startswith(f"{each.module}.")] for each in stages}
    if stage is None:
        return [inside[-1] for inside in by_stage.values() if inside]
    return by_stage[pick_stage(stages, stage).index]


def pick_stage(stages: Sequence[Stage], stage: int) -> Stage:
    """Return the stage of this number.

    Raises:
        UsageError: there is none; the message tells which there are.
    """
    found = [candidate for candidate in stages if candidate.index == stage]
    if not found:
        numbers = ", ".join(str(candidate.index) for candidate in stages)
        raise UsageError(f"expected a stage among {numbers}, got {stage}")
    return found[0]


@contextmanager
def recorded_outputs(network: nn.Module, stages: Sequence[Stage]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of stages while the network runs, as they stand in the graph of autograd."""
    outputs: dict[int, Tensor] = {}
    handles = []
    for stage in stages:

        def keep(_module: nn.Module, _inputs: Any, output: Any, index: int = stage.index) -> None:
            # EfficientViM's stages give their map and a hidden state.
            outputs[index] = output[0] if isinstance(output, tuple) else output

        handles.append(network.get_submodule(stage.module).register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def as_map(network: nn.Module, output: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Return a stage's output, or its gradient, as a map (B, C, h, w); tokens that are no patch are left out.

    Args:
        network: whose output it is.
        output: (B, C, h, w), (B, h, w, C) or tokens (B, N, C).
        channels: C.
        size: height and width of the image in pixels.

    Raises:
        UsageError: the output is no map, or its tokens form no grid.
    """
    if output.dim() == 4 and output.shape[1] == channels:
        return output
    if output.dim() == 4 and output.shape[3] == channels:
        return output.permute(0, 3, 1, 2)
    if output.dim() != 3 or output.shape[2] != channels:
        raise UsageError(
            f"expected a stage whose output is a map of {channels} channels or as wide tokens, "
            f"got the shape {tuple(output.shape)}"
        )
    grid = token_grid(network, output.shape[1], size)
    tokens = output[:, grid.patches.to(output.device)]
    return tokens.transpose(1, 2).unflatten(2, (grid.height, grid.width))


def token_grid(network: nn.Module, count: int, size: tuple[int, int]) -> TokenGrid:
    """Return how a sequence of `count` tokens covers an image of a size in pixels.

    Patches cover the image evenly, so of all grids with as many patches it is the one with the image's ratio.

    Raises:
        UsageError: no grid of about the image's ratio has as many patches, as with windows or pruned tokens.
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
    # Rounding to whole patches moves each side by less than one.
    if not (height - 1) / (width + 1) <= ratio <= (height + 1) / max(width - 1, 1e-9):
        raise UsageError(
            f"{number} tokens form no grid of the ratio of {size[0]}x{size[1]} px: expected one per patch"
        )
    others = places[~torch.isin(places, patches)]
    return TokenGrid(height, width, patches, others)
