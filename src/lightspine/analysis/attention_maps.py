"""Attention maps for one query: the implicit attention of selective scans, or softmax attention."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightspine.analysis.attention_weights import directed_scans, scan_column, scan_row, softmax_rows
from lightspine.analysis.figure_grid import Panel
from lightspine.analysis.image_input import ImageInput, ImageLike, read_image
from lightspine.analysis.model_handle import ModelHandle
from lightspine.analysis.op_recorder import OpCall, record_calls
from lightspine.analysis.results import ImageResult, input_panel
from lightspine.analysis.stages import TokenGrid, get_stage, list_stages, token_grid
from lightspine.errors import UsageError

Query = tuple[int, int] | Literal["class"]

_MIN_GRID_SIDE = 8
"""Minimum number of rows and columns of a map for its stage to be shown by default."""


@dataclass(frozen=True)
class AttentionResult(ImageResult):
    """Attention of one layer for one query.

    Attributes:
        module: name of the layer.
        kind: "scan" or "softmax".
        query: (y, x) in pixels of the preprocessed image.
        cell: (row, column) of the query in the layer's map.
        labels: names of the K scan directions or heads; the last label is that of the merged map.
        reads: attention of the query to every position, (K + 1, h, w); each map sums to 1. For a scan it is
            the mean over channels of the absolute weights, without the skip connection D.
        readers: attention of every position to the query, likewise; `None` for softmax attention.
    """

    module: str
    kind: str
    query: tuple[int, int]
    cell: tuple[int, int]
    labels: list[str]
    reads: np.ndarray
    readers: np.ndarray | None

    def image_panel(self) -> Panel:
        """Return the image with a cross at the query."""
        return input_panel(self.image, self._query_center())

    def rows(self) -> list[list[Panel]]:
        """Return the maps of `reads` and, for a scan, those of `readers`."""
        found = [self._panels("", self.reads)]
        if self.readers is not None:
            found.append(self._panels("read by: ", self.readers))
        return found

    def _panels(self, prefix: str, maps: np.ndarray) -> list[Panel]:
        return [
            Panel(
                f"{prefix}{label}", values, mark=self._query_center(), size=self.image.size, sqrt_scale=True
            )
            for label, values in zip(self.labels, maps, strict=True)
        ]

    def _query_center(self) -> tuple[float, float]:
        height, width = self.image.size
        _, rows, columns = self.reads.shape
        return (self.cell[0] + 0.5) * height / rows, (self.cell[1] + 0.5) * width / columns

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: image, reads, readers, labels, query and cell."""
        found = super().arrays() | {
            "reads": self.reads,
            "labels": np.asarray(self.labels),
            "query": np.asarray(self.query),
            "cell": np.asarray(self.cell),
        }
        return found if self.readers is None else found | {"readers": self.readers}

    def heading(self) -> str:
        """Return network, layer and query."""
        attention_type = "implicit attention" if self.kind == "scan" else "attention"
        return f"{self.model}, {self.image.name}: {attention_type} of {self.module}"

    def caption(self) -> str:
        """Return the text below the figure, which explains the scales."""
        meaning = "attention of the position at the cross to all positions"
        if self.kind == "scan":
            meaning += ", below: of all positions to it; mean absolute weight over channels"
        return f"{meaning}; each map on its own square-root scale"


@dataclass(frozen=True)
class ClassPathResult(ImageResult):
    """Attention of the class token, layer by layer.

    Attributes:
        modules: names of the layers.
        reads: attention of the class token to every patch, (layers, h, w); merged over the directions of a
            scan as in `AttentionResult`, averaged over the heads of softmax attention.
        kept: attention of the class token to itself and other prefix tokens, (layers,); with the sum of
            `reads` it is 1 per layer.
    """

    modules: list[str]
    reads: np.ndarray
    kept: np.ndarray

    def rows(self) -> list[list[Panel]]:
        """Return one map per layer."""
        titles = [
            f"{module}: {100 * kept:.0f} % own" for module, kept in zip(self.modules, self.kept, strict=True)
        ]
        return [
            [
                Panel(t, m, size=self.image.size, sqrt_scale=True)
                for t, m in zip(titles, self.reads, strict=True)
            ]
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: image, reads, kept and modules."""
        return super().arrays() | {
            "reads": self.reads,
            "kept": self.kept,
            "modules": np.asarray(self.modules),
        }

    def heading(self) -> str:
        """Return network and image."""
        return f"{self.model}, {self.image.name}: attention of the class token"

    def caption(self) -> str:
        """Return the text below the figure, which explains the scales."""
        return "own: attention of the class token to itself; each map on its own square-root scale"


def attention(
    handle: ModelHandle,
    images: Iterable[ImageLike],
    *,
    query: Query | None = None,
    stage: int | None = None,
) -> list[AttentionResult] | list[ClassPathResult]:
    """Compute attention maps for one query.

    Supported are the scans of VMamba and Vim, and the softmax attention of SHViT, EfficientMod and timm's
    transformers.

    Args:
        handle: see `lightspine.analysis.open_model`.
        images: files or open images.
        query: (y, x) in pixels of the preprocessed image, by default its center; or "class" for the class
            token in all layers.
        stage: index of a stage in the model's `feature_info`, whose last layer is shown; by default the last
            stage with a map of at least 8 x 8 positions, or the one with the largest map.

    Raises:
        UsageError: the model has no supported attention or no class token, the query is outside of the image,
            or the stage does not exist.
        LightspineError: an image cannot be read.
    """
    if query == "class":
        if stage is not None:
            raise UsageError("expected no stage with the query 'class', which shows all layers")
        return [_class_token_path(handle, read_image(handle, image)) for image in images]
    return [_query_attention(handle, read_image(handle, image), query, stage) for image in images]


def _query_attention(
    handle: ModelHandle, image_input: ImageInput, query: tuple[int, int] | None, stage: int | None
) -> AttentionResult:
    height, width = image_input.size
    y, x = (height // 2, width // 2) if query is None else query
    if not (0 <= y < height and 0 <= x < width):
        raise UsageError(
            f"expected a query Y,X from 0,0 to {height - 1},{width - 1} in the preprocessed image, "
            f"got {y},{x}"
        )
    layers = group_layers(_attention_calls(handle, image_input))
    layer = _select_layer(handle, layers, image_input, stage)
    calls = layers[layer]
    grid = _grid_of(handle, calls[0], image_input)
    cell = y * grid.height // height, x * grid.width // width
    place = int(grid.patches[cell[0] * grid.width + cell[1]])
    if calls[0].kind == "softmax":
        rows = softmax_rows(calls[0], torch.tensor([place]))[:, 0]
        keys = token_grid(handle.network, rows.shape[1], image_input.size)
        labels = [f"head {i}" for i in range(len(rows))] if len(rows) > 1 else []
        parts = [*rows, rows.mean(0)] if labels else [rows[0]]
        return AttentionResult(
            image_input,
            f"{handle.name}, {handle.state}",
            module=layer,
            kind="softmax",
            query=(y, x),
            cell=cell,
            labels=[*labels, "all heads"] if labels else ["its one head"],
            reads=_normalized_maps(parts, keys),
            readers=None,
        )
    scans = [scan for call in calls for scan in directed_scans(call)]
    # Without the skip connection D, which would dominate the map at the query itself.
    reads, readers = ([of(scan, place, skip=False) for scan in scans] for of in (scan_row, scan_column))
    return AttentionResult(
        image_input,
        f"{handle.name}, {handle.state}",
        module=layer,
        kind="scan",
        query=(y, x),
        cell=cell,
        labels=[*(scan.label for scan in scans), "merged"],
        reads=_normalized_maps([weights.abs().mean(1) for weights in (*reads, merged(reads))], grid),
        readers=_normalized_maps([weights.abs().mean(1) for weights in (*readers, merged(readers))], grid),
    )


def merged(weights: Sequence[Tensor]) -> Tensor:
    """Return the signed sum over directions, as the layer sums their outputs."""
    return torch.stack(list(weights)).sum(0)


def group_layers(calls: Iterable[OpCall]) -> dict[str, list[OpCall]]:
    """Group calls by layer; the two directions of a Vim mixer are calls of its submodules."""
    layers: dict[str, list[OpCall]] = {}
    for call in calls:
        name = call.module
        if call.kind == "selective_scan" and name.endswith((".ahead", ".back")):
            name = name.rpartition(".")[0]
        layers.setdefault(name, []).append(call)
    return layers


def _attention_calls(handle: ModelHandle, image_input: ImageInput) -> list[OpCall]:
    calls = record_calls(handle.network, image_input.pixels)
    if not calls:
        raise UsageError(
            f"{handle.name} has neither selective scans nor calls of scaled_dot_product_attention: expected "
            "VMamba, Vim, SHViT, EfficientMod with attention, or a transformer (erf and cam take every "
            "model, context EfficientMod, importance EfficientViM)"
        )
    return calls


def _select_layer(
    handle: ModelHandle, layers: dict[str, list[OpCall]], image_input: ImageInput, stage: int | None
) -> str:
    """Return the name of the last attention layer of a stage."""
    stages = list_stages(handle.network)
    last: dict[int, str] = {}
    for each in stages:
        inside = [name for name in layers if f"{name}.".startswith(f"{each.module}.")]
        if inside:
            last[each.index] = inside[-1]
    if not last:
        return list(layers)[-1]
    if stage is not None:
        get_stage(stages, stage)
        if stage not in last:
            numbers = ", ".join(map(str, last))
            raise UsageError(f"stage {stage} of {handle.name} has no attention, expected one of {numbers}")
        return last[stage]
    sides = {}
    for index, name in last.items():
        grid = _grid_of(handle, layers[name][0], image_input)
        sides[index] = min(grid.height, grid.width)
    large = [index for index, side in sides.items() if side >= min(_MIN_GRID_SIDE, max(sides.values()))]
    return last[large[-1]]


def _grid_of(handle: ModelHandle, call: OpCall, image_input: ImageInput) -> TokenGrid:
    """Return how the positions of a call cover the image."""
    if call.kind == "cross_scan":
        _, height, width, _ = call.args[0].shape
        return TokenGrid(height, width, torch.arange(height * width), torch.arange(0))
    length = call.args[0].shape[2 if call.kind == "selective_scan" else -2]
    return token_grid(handle.network, length, image_input.size)


def _normalized_maps(parts: Sequence[Tensor], grid: TokenGrid) -> np.ndarray:
    """Return weights (N,) as maps (K, h, w) that sum to 1."""
    maps = torch.stack([part[grid.patches] for part in parts]).view(-1, grid.height, grid.width)
    sums = maps.sum((1, 2), keepdim=True)
    # A map may be all zeros: nothing reads the last position of a scan direction.
    array: np.ndarray = torch.where(sums > 0, maps / sums.clamp(min=1e-300), 0).numpy()
    return array


def _class_token_path(handle: ModelHandle, image_input: ImageInput) -> ClassPathResult:
    layers = group_layers(_attention_calls(handle, image_input))
    reads, kept = [], []
    for calls in layers.values():
        grid = _grid_of(handle, calls[0], image_input)
        if not len(grid.others):
            raise UsageError(f"{handle.name} has no class token: expected a query Y,X in pixels")
        place = int(grid.others[0])
        if calls[0].kind == "softmax":
            row = softmax_rows(calls[0], torch.tensor([place]))[:, 0].mean(0).double()
        else:
            scans = [scan for call in calls for scan in directed_scans(call)]
            row = merged([scan_row(scan, place, skip=False) for scan in scans]).abs().mean(1)
        row = row / row.sum()
        reads.append(row[grid.patches].view(grid.height, grid.width).numpy())
        kept.append(float(row[grid.others].sum()))
    return ClassPathResult(
        image_input, f"{handle.name}, {handle.state}", list(layers), np.stack(reads), np.asarray(kept)
    )
