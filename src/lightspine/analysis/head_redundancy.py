"""Redundancy of attention heads: their similarity, and the accuracy without each, as studied by SHViT."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightspine.analysis.attention_weights import softmax_rows
from lightspine.analysis.figure_grid import COLORMAP, new_figure
from lightspine.analysis.image_input import ImageInput, ImageLike, read_image
from lightspine.analysis.model_handle import ModelHandle
from lightspine.analysis.op_recorder import OpCall, OpRecorder
from lightspine.analysis.stages import token_grid
from lightspine.data.image_folder import Sample
from lightspine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TOKENS = 4096
"""Maximum number of tokens, because head similarity needs the full attention matrices of a layer."""

_MAX_SHOWN_LAYERS = 3
_MAX_SHOWN_HEADS = 8

Bar = Callable[[Sequence[Sample], str], Iterable[Sample]]


@dataclass(frozen=True)
class RedundancyResult:
    """Similarity and ablation of the heads of all multi-head layers.

    Attributes:
        model: name of the model, and whether it is trained.
        modules: names of the layers, in network order.
        similarity: cosine similarity between the attention matrices of two heads, averaged over images,
            (heads, heads) per layer.
        maps: attention of each head, averaged over all queries of the first image, (heads, h, w) per layer; a
            map sums to 1, less the attention to prefix tokens.
        images: number of images that were averaged.
        image: the first image.
        labelled: number of labeled images of the ablation; 0 without an ablation.
        top1: accuracy with all heads in percent; `None` without an ablation.
        changes: accuracy without a head minus `top1`, in percentage points, (heads,) per layer; empty without
            an ablation.
    """

    model: str
    modules: list[str]
    similarity: list[np.ndarray]
    maps: list[np.ndarray]
    images: int
    image: ImageInput
    labelled: int
    top1: float | None
    changes: list[np.ndarray]

    def mean_similarity(self) -> list[float]:
        """Return the mean cosine similarity between two different heads of each layer."""
        return [float(off_diagonal(matrix).mean()) for matrix in self.similarity]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: image, modules, similarity_MODULE, maps_MODULE, change_MODULE, top1."""
        found = {"image": self.image.display, "modules": np.asarray(self.modules)}
        for module, matrix, heads in zip(self.modules, self.similarity, self.maps, strict=True):
            found |= {f"similarity_{module}": matrix, f"maps_{module}": heads}
        if self.top1 is not None:
            found["top1"] = np.asarray(self.top1)
            found |= {f"change_{m}": change for m, change in zip(self.modules, self.changes, strict=True)}
        return found

    def figure(self) -> "Figure":
        """Draw the similarities, the heads' maps of three layers, and the changes of accuracy."""
        return _draw_redundancy(self)


def redundancy(
    handle: ModelHandle,
    images: Iterable[ImageLike],
    *,
    labelled: Sequence[Sample] = (),
    bar: Bar | None = None,
) -> RedundancyResult:
    """Compare the heads of multi-head attention layers, and ablate them one at a time.

    This is the study of SHViT (Yun and Ro, CVPR 2024, section 3.1) for any timm model that calls
    `scaled_dot_product_attention`. Layers with a single token are left out.

    Args:
        handle: see `lightspine.analysis.open_model`.
        images: files or open images for the attention maps.
        labelled: image files with class indices, for example from `lightspine.data.list_images`, for the
            ablation; the model runs on each image once per head. Without them there is no ablation.
        bar: wraps the labeled images to show progress.

    Raises:
        UsageError: there is no image or no multi-head layer, or a layer has more than 4,096 tokens.
        LightspineError: an image cannot be read.
    """
    inputs = [read_image(handle, image) for image in images]
    if not inputs:
        raise UsageError("expected at least one image, got none")
    sums: dict[str, Tensor] = {}
    maps: dict[str, np.ndarray] = {}
    for image_input in inputs:
        for name, rows in _multi_head_attention(handle, image_input).items():
            sums[name] = sums.get(name, torch.zeros(())) + head_similarity(rows)
            if image_input is inputs[0]:
                maps[name] = _mean_maps(handle, rows, image_input)
    heads = {name: len(matrix) for name, matrix in sums.items()}
    top1: float | None = None
    changes: dict[str, np.ndarray] = {}
    if labelled:
        top1, changes = _ablate_heads(handle, heads, labelled, bar)
    return RedundancyResult(
        model=f"{handle.name}, {handle.state}",
        modules=list(sums),
        similarity=[(matrix / len(inputs)).numpy() for matrix in sums.values()],
        maps=[maps[name] for name in sums],
        images=len(inputs),
        image=inputs[0],
        labelled=len(labelled),
        top1=top1,
        changes=[changes[name] for name in sums] if labelled else [],
    )


def head_similarity(rows: Tensor) -> Tensor:
    """Compute the cosine similarity (heads, heads) between attention matrices (heads, N, N)."""
    unit = torch.nn.functional.normalize(rows.double().flatten(1), dim=1)
    return unit @ unit.t()


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Return the off-diagonal entries of a square matrix."""
    entries: np.ndarray = matrix[~np.eye(len(matrix), dtype=bool)]
    return entries


def _multi_head_attention(handle: ModelHandle, image_input: ImageInput) -> dict[str, Tensor]:
    """Compute the attention matrices (heads, N, N) of all multi-head layers for one image."""
    found: dict[str, Tensor] = {}

    def record(call: OpCall) -> None:
        # With a single token all heads are equal.
        if call.kind != "softmax" or _num_heads(call) < 2 or call.args[1].shape[-2] < 2:
            return
        if call.args[0].shape[-2] > MAX_TOKENS:
            raise UsageError(
                f"expected at most {MAX_TOKENS} tokens to compare heads, got {call.args[0].shape[-2]} in "
                f"{call.module}: use a smaller size"
            )
        found[call.module] = softmax_rows(call)

    with torch.no_grad(), OpRecorder(handle.network, record):
        handle.network(image_input.pixels)
    if not found:
        raise UsageError(
            f"{handle.name} has no multi-head attention that calls scaled_dot_product_attention: expected a "
            "model such as efficientmod_xxs or deit_tiny_patch16_224"
        )
    return found


def _num_heads(call: OpCall) -> int:
    query = call.args[0]
    return int(query.shape[1]) if query.dim() == 4 else 1


def _mean_maps(handle: ModelHandle, rows: Tensor, image_input: ImageInput) -> np.ndarray:
    grid = token_grid(handle.network, rows.shape[2], image_input.size)
    array: np.ndarray = rows.mean(1)[:, grid.patches].unflatten(1, (grid.height, grid.width)).numpy()
    return array


def _ablate_heads(
    handle: ModelHandle, heads: dict[str, int], labelled: Sequence[Sample], bar: Bar | None
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the accuracy with all heads, and its change without each head, in percent."""
    right = 0
    kept = {name: np.zeros(count) for name, count in heads.items()}
    # Each image is loaded once and then classified without each head in turn.
    for sample in bar(labelled, "ablating heads") if bar else labelled:
        pixels = read_image(handle, sample.path).pixels
        with torch.no_grad():
            right += int(handle.network(pixels)[0].argmax()) == sample.label
            for name, count in heads.items():
                for head in range(count):
                    logits = run_without_head(handle, pixels, name, head)
                    kept[name][head] += int(logits[0].argmax()) == sample.label
    total = len(labelled) / 100
    return right / total, {name: (counts - right) / total for name, counts in kept.items()}


def run_without_head(handle: ModelHandle, pixels: Tensor, module: str, head: int) -> Tensor:
    """Return the logits for images (B, 3, H, W) with the output of one head set to zero."""

    def zero_head(call: OpCall) -> Tensor | None:
        if call.kind != "softmax" or call.module != module:
            return None
        output = call.output.clone()
        output[:, head] = 0
        return output

    with torch.no_grad(), OpRecorder(handle.network, zero_head):
        logits: Tensor = handle.network(pixels)
    return logits


def _draw_redundancy(result: RedundancyResult) -> "Figure":
    """Draw similarities and changes of accuracy by layer, and the heads' maps of three layers."""
    from matplotlib.gridspec import GridSpec

    layers = sorted({0, len(result.modules) // 2, len(result.modules) - 1})[:_MAX_SHOWN_LAYERS]
    heads = min(max(len(result.similarity[layer]) for layer in layers), _MAX_SHOWN_HEADS)
    figure = new_figure(max(7.4, 1.15 * (heads + 2)), 2.6 + 1.25 * len(layers))
    figure.set_layout_engine("constrained")
    parts = figure.subfigures(2, 1, height_ratios=[2.2, 1.25 * len(layers)], squeeze=False)
    top, bottom = parts[0, 0], parts[1, 0]
    top.suptitle(f"{result.model}: attention heads", fontsize=10.5, x=0.01, ha="left")
    bars = top.subplots(1, 2 if result.changes else 1, squeeze=False)[0]
    _draw_similarity(bars[0], result)
    if result.changes:
        _draw_changes(bars[1], result)
    grid = GridSpec(len(layers), heads + 1, figure=bottom)
    for row, layer in enumerate(layers):
        matrix = bottom.add_subplot(grid[row, 0])
        matrix.imshow(result.similarity[layer], cmap="Greys", vmin=0, vmax=1)
        _draw_title_only(matrix, f"{_short_name(result.modules[layer])}\ncosine similarity")
        for head in range(min(len(result.maps[layer]), heads)):
            axes = bottom.add_subplot(grid[row, head + 1])
            axes.imshow(result.maps[layer][head], cmap=COLORMAP, vmin=0)
            _draw_title_only(axes, f"head {head}")
    return figure


def _draw_similarity(axes: "Axes", result: RedundancyResult) -> None:
    axes.bar(range(len(result.modules)), result.mean_similarity(), color="0.45", width=0.7)
    images = "1 image" if result.images == 1 else f"{result.images} images"
    axes.set_title(f"mean cosine similarity of two heads, {images}", fontsize=9)
    axes.set_ylim(0, 1)
    _label_layers(axes, result)


def _draw_changes(axes: "Axes", result: RedundancyResult) -> None:
    for layer, changes in enumerate(result.changes):
        axes.plot(np.full(len(changes), layer), changes, "o", color="black", markersize=4, alpha=0.55)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_title(
        f"top-1 without one head minus {result.top1:.1f} %, points, {result.labelled} images", fontsize=9
    )
    _label_layers(axes, result)


def _label_layers(axes: "Axes", result: RedundancyResult) -> None:
    count = len(result.modules)
    axes.set_xticks(
        range(count), [_short_name(name) for name in result.modules], rotation=45 if count > 3 else 0
    )
    axes.set_xlim(-0.6, count - 0.4)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_title_only(axes: "Axes", title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=7.5, pad=2)


def _short_name(module: str) -> str:
    return module.removesuffix(".attn")
