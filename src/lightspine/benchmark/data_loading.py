"""Benchmark of data loading: images per second and core of an image folder, as the trainer reads it."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lightspine.benchmark.system import describe_system, load_average
from lightspine.data.gpu_decoding import DecodeDevice
from lightspine.data.modules import ImageFolderDataModule
from lightspine.data.samplers import EpochSampler
from lightspine.data.transforms import AugmentationName
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.devices import synchronize, torch_threads

DECODE, LOAD = "decode", "load"


@dataclass(frozen=True, kw_only=True)
class LoadingRow:
    """Speed of one way to read the images.

    Attributes:
        part: "decode" (files to 8-bit RGB, without a data loader) or "load" (batches as in training).
        workers: worker processes of the data loader; 0 loads in the main process.
        images: number of images.
        seconds: wall-clock time; with workers, from the first batch on.
        cpu_seconds: processor time of all processes.
        images_per_s: images per second of wall-clock time.
        images_per_core_s: images per second of processor time: what one core loads.
    """

    part: str
    workers: int
    images: int
    seconds: float
    cpu_seconds: float
    images_per_s: float
    images_per_core_s: float


@dataclass(frozen=True, kw_only=True)
class LoadingReport:
    """Rows of a benchmark of data loading, with its settings and the system.

    Attributes:
        folder: the image folder.
        size: side of the training images in pixels.
        augmentation: name of the training augmentation.
        batch: images per batch.
        decode: where the JPEGs of the part "load" are decoded, "cpu" or "cuda".
        rows: one per part and number of workers.
        load_before: load average before the measurement.
        system: see `describe_system`.
    """

    folder: str
    size: int
    augmentation: str
    batch: int
    decode: DecodeDevice
    rows: list[LoadingRow]
    load_before: float | None
    system: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return asdict(self)


def measure_loading(
    folder: str | Path,
    *,
    size: int = 224,
    augmentation: AugmentationName = "medium",
    workers: Sequence[int] = (0, 2),
    batch: int = 64,
    images: int = 1000,
    decode: DecodeDevice = "cpu",
    on_step: Callable[[str], None] = lambda _: None,
) -> LoadingReport:
    """Measure how fast the training images of an image folder are read, with one thread per process.

    The same images are read by every row, so all but the first find them in the file cache.

    Args:
        folder: image folder, see `lightspine.data.modules.ImageFolderDataModule`.
        size: side of the training images in pixels.
        augmentation: training augmentation.
        workers: numbers of worker processes of the data loader.
        batch: images per batch.
        images: number of images of every row, rounded down to whole batches; a smaller folder is repeated.
        decode: "cpu", or "cuda" to decode and augment on the GPU, as `--data.decode=cuda` in training.
        on_step: called with the name of every row before it is measured.

    Raises:
        UsageError: the folder is not an image folder, or a value is out of range.
        LightspineError: an image cannot be read.
    """
    if images < 2 * batch:
        raise UsageError(f"expected at least two batches of {batch} images, got {images} images")
    if not workers:
        raise UsageError("expected a number of workers, got none")
    load_before = load_average()
    modules = {count: _data(folder, size, augmentation, batch, count, images, decode) for count in workers}
    with torch_threads(1):
        on_step("decoding")
        rows = [_measure_decoding(next(iter(modules.values())), images)]
        for count, data in modules.items():
            on_step(f"{count} workers")
            rows.append(_measure_batches(data, count))
        system = describe_system()
    return LoadingReport(
        folder=str(folder),
        size=size,
        augmentation=augmentation,
        batch=batch,
        decode=decode,
        rows=rows,
        load_before=load_before,
        system=system,
    )


def _data(
    folder: str | Path,
    size: int,
    augmentation: AugmentationName,
    batch: int,
    workers: int,
    images: int,
    decode: DecodeDevice,
) -> ImageFolderDataModule:
    data = ImageFolderDataModule(
        folder,
        image_size=size,
        augmentation=augmentation,
        batch_size=batch,
        num_workers=workers,
        decode=decode,
    )
    data.images_per_epoch = images
    return data


def _measure_decoding(data: ImageFolderDataModule, images: int) -> LoadingRow:
    source = data.train_source
    # The order of the files on the disk would be faster than that of a training.
    sampler = cast(EpochSampler, data.train_dataloader().sampler)
    order = [position for position, _ in sampler][:images]
    started, cpu = time.perf_counter(), time.process_time()
    for position in order:
        source.open(position)
    return _row(DECODE, 0, len(order), time.perf_counter() - started, time.process_time() - cpu)


def _measure_batches(data: ImageFolderDataModule, workers: int) -> LoadingRow:
    loader = data.train_dataloader()
    cpu = _cpu_seconds()
    started = time.perf_counter()
    loaded = first = 0
    device = torch.device("cpu" if data.jpeg_decoder is None else data.jpeg_decoder.device_type)
    for encoded in loader:
        batch = encoded if data.jpeg_decoder is None else data.transfer_batch_to_device(encoded, device, 0)
        if batch.bad:
            raise LightspineError(f"cannot read image {batch.bad[0].path}: {batch.bad[0].reason}")
        loaded += len(batch.images)
        if workers and not first:
            # Workers take time to start, once per epoch.
            synchronize(device)
            first, started = loaded, time.perf_counter()
    synchronize(device)
    seconds = time.perf_counter() - started
    # The loader has waited for its workers, whose processor time is that of all images.
    return _row(LOAD, workers, loaded, seconds, _cpu_seconds() - cpu, untimed=first)


def _row(
    part: str, workers: int, images: int, seconds: float, cpu_seconds: float, *, untimed: int = 0
) -> LoadingRow:
    return LoadingRow(
        part=part,
        workers=workers,
        images=images,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        images_per_s=(images - untimed) / seconds,
        images_per_core_s=images / cpu_seconds,
    )


def _cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
