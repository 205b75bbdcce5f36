"""Batches of images in a fixed order, with what could not be read."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightspine.errors import LightspineError


class StreamItem(NamedTuple):
    """One image at its place, or the sentence that says why there is none."""

    position: int
    image: Tensor | None
    reason: str = ""


class StreamBatch(NamedTuple):
    """The readable images of neighbouring places.

    Attributes:
        positions: the place of every image.
        images: (N, 3, H, W), float32; N may be 0.
        bad: place and reason of those that could not be read.
        end: the place behind the last.
    """

    positions: list[int]
    images: Tensor
    bad: list[tuple[int, str]]
    end: int


def stream_batches(
    images: Any,
    transform: Callable[[Image.Image], Tensor],
    ranges: Sequence[range],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Return a loader of `StreamBatch`es that reads ranges of places in order; no batch reaches over two.

    A range gives the same batches whatever was read before it, so that a resumed run rounds alike.

    Args:
        images: gives an image by its place: `ListedFolder` or `ShardSource`.
        transform: turns a PIL RGB image into a (3, H, W) tensor.
        ranges: the places to read.
        batch_size: most images of a batch.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: see PyTorch's data loader.
    """
    return DataLoader(
        _Stream(images, transform),
        batch_sampler=_Batches(ranges, batch_size),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
    )


class _Stream(Dataset[StreamItem]):
    def __init__(self, images: Any, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, position: int) -> StreamItem:
        try:
            image = self.images.open(position)
        except LightspineError as error:
            return StreamItem(position, None, str(error))
        return StreamItem(position, self.transform(image))


class _Batches:
    def __init__(self, ranges: Sequence[range], batch_size: int) -> None:
        self.ranges = ranges
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for places in self.ranges:
            for start in range(0, len(places), self.batch_size):
                yield list(places[start : start + self.batch_size])

    def __len__(self) -> int:
        return sum(-(-len(places) // self.batch_size) for places in self.ranges)


def _collate(items: Sequence[StreamItem]) -> StreamBatch:
    read = [item for item in items if item.image is not None]
    tensors = [item.image for item in read if item.image is not None]
    return StreamBatch(
        [item.position for item in read],
        torch.stack(tensors) if tensors else torch.empty(0),
        [(item.position, item.reason) for item in items if item.image is None],
        items[-1].position + 1,
    )
