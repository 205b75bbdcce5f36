"""What one pixel reads, and what reads it: in the implicit attention of a scan, or in softmax attention."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightspine.analysis.attention_results import AttentionResult, ClassPathResult
from lightspine.analysis.pictures import ImageLike, Picture, read_picture
from lightspine.analysis.recording import OperatorCall, record_calls
from lightspine.analysis.scan_rows import directed_scans, readers_of, reads_of
from lightspine.analysis.softmax_rows import attention_rows
from lightspine.analysis.stages import TokenGrid, list_stages, pick_stage, token_grid
from lightspine.analysis.subject import Subject
from lightspine.errors import UsageError

Query = tuple[int, int] | Literal["class"]

_LEAST_SIDE = 8
"""Where no stage is asked for, the last one whose map has at least so many rows and columns is shown."""


def attention(
    subject: Subject,
    images: Iterable[ImageLike],
    *,
    query: Query | None = None,
    stage: int | None = None,
) -> list[AttentionResult] | list[ClassPathResult]:
    """Compute attention for one query: VMamba's and Vim's scans, SHViT, EfficientMod, timm's transformers.

    Args:
        subject: see `lightspine.analysis.open_subject`.
        images: files or open images.
        query: (y, x) in pixels of the image as the network sees it, the middle by default; "class" for the
            class token, layer by layer.
        stage: number in the model's `feature_info`, whose last layer is shown; by default the last stage with
            a map of at least 8 x 8 positions, else the one with the largest.

    Raises:
        UsageError: the network mixes positions in another way, has no class token, a query outside the image,
            no such stage.
        LightspineError: an image cannot be read.
    """
    if query == "class":
        if stage is not None:
            raise UsageError("expected no stage with the query 'class', which is shown for every layer")
        return [_class_path(subject, read_picture(subject, image)) for image in images]
    return [_attention(subject, read_picture(subject, image), query, stage) for image in images]


def _attention(
    subject: Subject, picture: Picture, query: tuple[int, int] | None, stage: int | None
) -> AttentionResult:
    height, width = picture.size
    y, x = (height // 2, width // 2) if query is None else query
    if not (0 <= y < height and 0 <= x < width):
        raise UsageError(
            f"expected a query Y,X from 0,0 to {height - 1},{width - 1} in the image as the network sees it, "
            f"got {y},{x}"
        )
    layers = group_layers(_calls(subject, picture))
    layer = _choose_layer(subject, layers, picture, stage)
    calls = layers[layer]
    grid = _grid_of(subject, calls[0], picture)
    cell = y * grid.height // height, x * grid.width // width
    place = int(grid.patches[cell[0] * grid.width + cell[1]])
    if calls[0].kind == "softmax":
        rows = attention_rows(calls[0], torch.tensor([place]))[:, 0]
        keys = token_grid(subject.network, rows.shape[1], picture.size)
        labels = [f"head {i}" for i in range(len(rows))] if len(rows) > 1 else []
        parts = [*rows, rows.mean(0)] if labels else [rows[0]]
        return AttentionResult(
            picture,
            f"{subject.name}, {subject.state}",
            module=layer,
            kind="softmax",
            query=(y, x),
            cell=cell,
            labels=[*labels, "all heads"] if labels else ["its one head"],
            reads=_maps(parts, keys),
            readers=None,
        )
    scans = [scan for call in calls for scan in directed_scans(call)]
    # Without the skip D, which belongs to no attention and outshines it where a place meets itself.
    reads, readers = ([of(scan, place, skip=False) for scan in scans] for of in (reads_of, readers_of))
    return AttentionResult(
        picture,
        f"{subject.name}, {subject.state}",
        module=layer,
        kind="scan",
        query=(y, x),
        cell=cell,
        labels=[*(scan.label for scan in scans), "merged"],
        reads=_maps([weights.abs().mean(1) for weights in (*reads, merged(reads))], grid),
        readers=_maps([weights.abs().mean(1) for weights in (*readers, merged(readers))], grid),
    )


def merged(weights: Sequence[Tensor]) -> Tensor:
    """Return the sum over directions, signs and all, as the layer adds up their outputs."""
    return torch.stack(list(weights)).sum(0)


def group_layers(calls: Iterable[OperatorCall]) -> dict[str, list[OperatorCall]]:
    """Sort calls by layer: the two directions of a Vim mixer are calls of its children."""
    layers: dict[str, list[OperatorCall]] = {}
    for call in calls:
        name = call.module
        if call.kind == "selective_scan" and name.endswith((".ahead", ".back")):
            name = name.rpartition(".")[0]
        layers.setdefault(name, []).append(call)
    return layers


def _calls(subject: Subject, picture: Picture) -> list[OperatorCall]:
    calls = record_calls(subject.network, picture.pixels)
    if not calls:
        raise UsageError(
            f"{subject.name} has neither a selective scan nor softmax attention that PyTorch computes: "
            "expected VMamba, Vim, SHViT, EfficientMod with attention, or a transformer (erf and cam take "
            "every model, context EfficientMod, importance EfficientViM)"
        )
    return calls


def _choose_layer(
    subject: Subject, layers: dict[str, list[OperatorCall]], picture: Picture, stage: int | None
) -> str:
    """Return the last layer of a stage."""
    stages = list_stages(subject.network)
    last: dict[int, str] = {}
    for each in stages:
        inside = [name for name in layers if f"{name}.".startswith(f"{each.module}.")]
        if inside:
            last[each.index] = inside[-1]
    if not last:
        return list(layers)[-1]
    if stage is not None:
        pick_stage(stages, stage)
        if stage not in last:
            numbers = ", ".join(map(str, last))
            raise UsageError(f"stage {stage} of {subject.name} has no attention, expected one of {numbers}")
        return last[stage]
    sides = {}
    for index, name in last.items():
        grid = _grid_of(subject, layers[name][0], picture)
        sides[index] = min(grid.height, grid.width)
    large = [index for index, side in sides.items() if side >= min(_LEAST_SIDE, max(sides.values()))]
    return last[large[-1]]


def _grid_of(subject: Subject, call: OperatorCall, picture: Picture) -> TokenGrid:
    """Return how the positions of a call cover the image."""
    if call.kind == "cross_scan":
        _, height, width, _ = call.args[0].shape
        return TokenGrid(height, width, torch.arange(height * width), torch.arange(0))
    length = call.args[0].shape[2 if call.kind == "selective_scan" else -2]
    return token_grid(subject.network, length, picture.size)


def _maps(parts: Sequence[Tensor], grid: TokenGrid) -> np.ndarray:
    """Return each (N,) of weights as a map of shares, (K, h, w)."""
    maps = torch.stack([part[grid.patches] for part in parts]).view(-1, grid.height, grid.width)
    sums = maps.sum((1, 2), keepdim=True)
    # A pixel that nothing reads in a direction, such as the last of a walk with a zero skip, stays at zero.
    array: np.ndarray = torch.where(sums > 0, maps / sums.clamp(min=1e-300), 0).numpy()
    return array


def _class_path(subject: Subject, picture: Picture) -> ClassPathResult:
    layers = group_layers(_calls(subject, picture))
    reads, kept = [], []
    for calls in layers.values():
        grid = _grid_of(subject, calls[0], picture)
        if not len(grid.others):
            raise UsageError(f"{subject.name} has no class token: expected a query Y,X in pixels")
        place = int(grid.others[0])
        if calls[0].kind == "softmax":
            row = attention_rows(calls[0], torch.tensor([place]))[:, 0].mean(0).double()
        else:
            scans = [scan for call in calls for scan in directed_scans(call)]
            row = merged([reads_of(scan, place, skip=False) for scan in scans]).abs().mean(1)
        row = row / row.sum()
        reads.append(row[grid.patches].view(grid.height, grid.width).numpy())
        kept.append(float(row[grid.others].sum()))
    return ClassPathResult(
        picture, f"{subject.name}, {subject.state}", list(layers), np.stack(reads), np.asarray(kept)
    )
