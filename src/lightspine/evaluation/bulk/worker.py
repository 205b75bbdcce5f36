"""One process's share of a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightspine.data.transforms import Preprocessing, create_eval_transform
from lightspine.evaluation.bulk.folder import RunFolder
from lightspine.evaluation.bulk.listing import open_images
from lightspine.evaluation.bulk.outputs import Compute, Features, Table, TopClasses, finite_rows, no_grad
from lightspine.evaluation.bulk.stream import StreamBatch, stream_batches
from lightspine.evaluation.networks import Weights, load_network

NOT_FINITE = "the model gives values that are not finite"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker process needs to know; plain values that can be sent to it.

    Attributes:
        model: see `load_network`, as `checkpoint` and `weights`.
        data: a folder, or shards.
        preprocessing: of the images.
        output: what to compute.
        folder: where the parts go.
        batch_size: images per forward pass.
        part_size: images per part.
        num_workers: processes that read images, for each worker.
    """

    model: str
    checkpoint: str | None
    weights: Weights
    data: str
    preprocessing: Preprocessing
    output: TopClasses | Features
    folder: RunFolder
    batch_size: int
    part_size: int
    num_workers: int


def run_share(
    job: Job, parts: Sequence[int], device: str, *, on_images: Callable[[int], None], compute: Compute
) -> None:
    """Compute and write parts, in order.

    Args:
        job: what to do.
        parts: numbers of the parts.
        device: torch's name of the device that `compute` runs on.
        on_images: is told after every batch how many images were dealt with.
        compute: from images (N, 3, H, W) on the device to columns.

    Raises:
        LightspineError: a part cannot be written.
    """
    if not parts:
        return
    images = open_images(job.data, job.folder.parts)
    ranges = [places(number, job.part_size, len(images)) for number in parts]
    loader = stream_batches(
        images,
        create_eval_transform(job.preprocessing),
        ranges,
        batch_size=job.batch_size,
        num_workers=job.num_workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    batches = iter(loader)
    compute = no_grad(compute)
    for number, part in zip(parts, ranges, strict=True):
        positions, tables, bad = [], [], []
        for batch in _until(batches, part.stop):
            kept, table, wrong = _rows(batch, compute, device)
            positions += kept
            tables += [table] if kept else []
            bad += wrong
            on_images(len(batch.positions) + len(batch.bad))
        job.folder.write_part(
            number,
            [images.name(position) for position in positions],
            _concatenate(tables),
            [(images.name(position), reason) for position, reason in sorted(bad)],
        )


def load_compute(job: Job, device: str) -> Compute:
    """Load the checkpoint onto a device and return what it is to compute; raises as `load_network` does."""
    network, saved = load_network(job.model, job.checkpoint, weights=job.weights)
    return job.output.prepare(network.to(device), saved)


def count_parts(images: int, part_size: int) -> int:
    """Return how many parts so many images make."""
    return -(-images // part_size)


def places(number: int, part_size: int, images: int) -> range:
    """Return the places of a part's images."""
    return range(number * part_size, min((number + 1) * part_size, images))


def _until(batches: Iterator[StreamBatch], stop: int) -> Iterator[StreamBatch]:
    """Yield batches up to the one that ends at `stop`."""
    for batch in batches:
        yield batch
        if batch.end == stop:
            return


def _rows(
    batch: StreamBatch, compute: Compute, device: str
) -> tuple[list[int], Table, list[tuple[int, str]]]:
    """Return the places and columns of a batch's images, and the place and reason of what has no row."""
    if not batch.positions:
        return [], {}, batch.bad
    table = compute(batch.images.to(device, non_blocking=True))
    finite = finite_rows(table)
    if finite.all():
        return batch.positions, table, batch.bad
    kept = [position for position, good in zip(batch.positions, finite, strict=True) if good]
    wrong = [(position, NOT_FINITE) for position in batch.positions if position not in set(kept)]
    return kept, {name: column[finite] for name, column in table.items()}, batch.bad + wrong


def _concatenate(tables: list[Table]) -> Table | None:
    if not tables:
        return None
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def spread(parts: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Return the share of one process: every `world_size`-th part."""
    return list(parts[rank::world_size])


def own_device(device: str, rank: int) -> str:
    """Return the device of one process: "cuda" means a GPU for each."""
    return f"cuda:{rank}" if device == "cuda" else device
