"""How alike the heads of softmax attention are, and what each is worth: SHViT's argument for one head."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightspine.analysis.pictures import ImageLike, Picture, read_picture
from lightspine.analysis.recording import OperatorCall, OperatorWatch
from lightspine.analysis.softmax_rows import attention_rows
from lightspine.analysis.stages import token_grid
from lightspine.analysis.subject import Subject
from lightspine.data.image_folder import Sample
from lightspine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TOKENS = 4096
"""All rows of a layer's attention are made at once for the similarity: more tokens are refused."""

Bar = Callable[[Sequence[Sample], str], Iterable[Sample]]


@dataclass(frozen=True)
class RedundancyResult:
    """The heads of every multi-head layer.

    Attributes:
        subject: name of the network and whether it was trained.
        modules: names of the layers, in the order of the network.
        similarity: of each layer, (heads, heads): cosine between the attention matrices of two heads, mean
            over images; 1 on the diagonal.
        maps: of each layer, (heads, h, w): what each head reads on average over all queries of the first
            image; the sum over an image is 1, less what prefix tokens get.
        images: how many were averaged.
        picture: the first image.
        labelled: how many labelled images the scores are of; 0 where no head was left out.
        top1: score in percent with all heads; `None` where no head was left out.
        changes: of each layer, (heads,): score without that head minus `top1`, in points; empty likewise.
    """

    subject: str
    modules: list[str]
    similarity: list[np.ndarray]
    maps: list[np.ndarray]
    images: int
    picture: Picture
    labelled: int
    top1: float | None
    changes: list[np.ndarray]

    def mean_similarity(self) -> list[float]:
        """Return, of each layer, the mean cosine between two different heads."""
        return [float(off_diagonal(matrix).mean()) for matrix in self.similarity]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return similarity_MODULE, maps_MODULE and, where heads were left out, change_MODULE and top1."""
        found = {"image": self.picture.shown, "modules": np.asarray(self.modules)}
        for module, matrix, heads in zip(self.modules, self.similarity, self.maps, strict=True):
            found |= {f"similarity_{module}": matrix, f"maps_{module}": heads}
        if self.top1 is not None:
            found["top1"] = np.asarray(self.top1)
            found |= {f"change_{m}": change for m, change in zip(self.modules, self.changes, strict=True)}
        return found

    def figure(self) -> "Figure":
        """Draw similarities, the heads' maps of three layers and what leaving a head out changes."""
        from lightspine.analysis.redundancy_figure import draw_redundancy

        return draw_redundancy(self)


def redundancy(
    subject: Subject,
    images: Iterable[ImageLike],
    *,
    labelled: Sequence[Sample] = (),
    bar: Bar | None = None,
) -> RedundancyResult:
    """Compare the heads of every layer with several of more than one token, and leave them out one at a time.

    The study of SHViT (Yun and Ro, CVPR 2024, section 3.1) for any timm model whose attention PyTorch
    computes.

    Args:
        subject: see `lightspine.analysis.open_subject`.
        images: files or open images for the attention maps.
        labelled: image files and their class numbers, such as from `lightspine.data.list_images`; the network
            runs on each once per head. Without any no head is left out.
        bar: wraps the labelled images to show progress.

    Raises:
        UsageError: no image, no multi-head layer, or more than 4,096 tokens.
        LightspineError: an image cannot be read.
    """
    pictures = [read_picture(subject, image) for image in images]
    if not pictures:
        raise UsageError("expected at least one image, got none")
    sums: dict[str, Tensor] = {}
    maps: dict[str, np.ndarray] = {}
    for picture in pictures:
        for name, rows in _attention_of(subject, picture).items():
            sums[name] = sums.get(name, torch.zeros(())) + head_similarity(rows)
            if picture is pictures[0]:
                maps[name] = _mean_maps(subject, rows, picture)
    heads = {name: len(matrix) for name, matrix in sums.items()}
    top1: float | None = None
    changes: dict[str, np.ndarray] = {}
    if labelled:
        top1, changes = _leave_out(subject, heads, labelled, bar)
    return RedundancyResult(
        subject=f"{subject.name}, {subject.state}",
        modules=list(sums),
        similarity=[(matrix / len(pictures)).numpy() for matrix in sums.values()],
        maps=[maps[name] for name in sums],
        images=len(pictures),
        picture=pictures[0],
        labelled=len(labelled),
        top1=top1,
        changes=[changes[name] for name in sums] if labelled else [],
    )


def head_similarity(rows: Tensor) -> Tensor:
    """Return the cosine between the attention matrices of heads, (heads, heads), for rows (heads, N, N)."""
    unit = torch.nn.functional.normalize(rows.double().flatten(1), dim=1)
    return unit @ unit.t()


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Return the entries of a square matrix that are not on its diagonal."""
    entries: np.ndarray = matrix[~np.eye(len(matrix), dtype=bool)]
    return entries


def _attention_of(subject: Subject, picture: Picture) -> dict[str, Tensor]:
    """Return the attention (heads, N, N) of every multi-head layer for one image."""
    found: dict[str, Tensor] = {}

    def note(call: OperatorCall) -> None:
        # Of a single token all heads read the same: there is nothing to compare.
        if call.kind != "softmax" or _heads_of(call) < 2 or call.args[1].shape[-2] < 2:
            return
        if call.args[0].shape[-2] > MOST_TOKENS:
            raise UsageError(
                f"expected at most {MOST_TOKENS} tokens to compare heads, got {call.args[0].shape[-2]} in "
                f"{call.module}: take a smaller size"
            )
        found[call.module] = attention_rows(call)

    with torch.no_grad(), OperatorWatch(subject.network, note):
        subject.network(picture.pixels)
    if not found:
        raise UsageError(
            f"{subject.name} has no attention with several heads that PyTorch computes: expected such as "
            "efficientmod_xxs or deit_tiny_patch16_224"
        )
    return found


def _heads_of(call: OperatorCall) -> int:
    query = call.args[0]
    return int(query.shape[1]) if query.dim() == 4 else 1


def _mean_maps(subject: Subject, rows: Tensor, picture: Picture) -> np.ndarray:
    grid = token_grid(subject.network, rows.shape[2], picture.size)
    array: np.ndarray = rows.mean(1)[:, grid.patches].unflatten(1, (grid.height, grid.width)).numpy()
    return array


def _leave_out(
    subject: Subject, heads: dict[str, int], labelled: Sequence[Sample], bar: Bar | None
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the score with all heads, and the change without each, both over labelled images."""
    right = 0
    kept = {name: np.zeros(count) for name, count in heads.items()}
    # An image is read once and then classified without each head in turn.
    for sample in bar(labelled, "leaving heads out") if bar else labelled:
        pixels = read_picture(subject, sample.path).pixels
        with torch.no_grad():
            right += int(subject.network(pixels)[0].argmax()) == sample.label
            for name, count in heads.items():
                for head in range(count):
                    logits = run_without_head(subject, pixels, name, head)
                    kept[name][head] += int(logits[0].argmax()) == sample.label
    total = len(labelled) / 100
    return right / total, {name: (counts - right) / total for name, counts in kept.items()}


def run_without_head(subject: Subject, pixels: Tensor, module: str, head: int) -> Tensor:
    """Return the logits of images (B, 3, H, W) when one head of one layer gives nothing."""

    def silence(call: OperatorCall) -> Tensor | None:
        if call.kind != "softmax" or call.module != module:
            return None
        output = call.output.clone()
        output[:, head] = 0
        return output

    with torch.no_grad(), OperatorWatch(subject.network, silence):
        logits: Tensor = subject.network(pixels)
    return logits
