"""Batch inference over any number of images."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightspine.data.transforms import Preprocessing, create_eval_transform
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.batch_inference.outputs import (
    Compute,
    Features,
    Table,
    TopClasses,
    finite_rows,
    no_grad,
)
from lightspine.evaluation.batch_inference.sources import StreamBatch, hash_names, open_images, stream_batches
from lightspine.evaluation.batch_inference.storage import Csv, Npy, Parquet, RunFolder, find_format
from lightspine.evaluation.classifiers import Weights, find_preprocessing, load_classifier
from lightspine.evaluation.report import describe_device, describe_software, hash_file
from lightspine.utils.devices import check_device


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How a run over many images is done.

    Attributes:
        checkpoint: the file of weights, where the model is given by its name.
        weights: "model" (as trained), "ema" (their average), or "auto" for those whose score is published.
        image_size: height and width in pixels; the checkpoint's own without it.
        crop_pct: see `lightspine.evaluation.classifiers.find_preprocessing`.
        crop_mode: likewise.
        batch_size: images per forward pass.
        part_size: images per part; a killed run loses at most one part per process. The rows of one part are
            in memory at a time.
        num_workers: processes that read images, per device; 0 reads in the process that computes.
        device: torch's name of the device; "cuda" gives every process a GPU of its own.
        devices: how many processes share the work. More than one are started with Python's "spawn", so a
            script that calls this needs `if __name__ == "__main__"`. Under torchrun its processes do it.
        resume: go on with what an earlier run in the folder has done; a finished one stays as it is.
        progress: show a bar on the standard error.

    Raises:
        UsageError: a number out of its range.
    """

    checkpoint: str | Path | None = None
    weights: Weights = "auto"
    image_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    batch_size: int = 64
    part_size: int = 1024
    num_workers: int = 0
    device: str = "cpu"
    devices: int = 1
    resume: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("part_size", self.part_size, 1),
            ("num_workers", self.num_workers, 0),
            ("devices", self.devices, 1),
        ):
            if value < least:
                raise UsageError(f"expected {name} of at least {least}, got {value}")
        if self.devices > 1 and ":" in self.device:
            raise UsageError(f"expected a kind of device, such as cuda, for several, got {self.device}")


NOT_FINITE = "the model gives values that are not finite"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker process needs to know; plain values that can be sent to it.

    Attributes:
        model: see `load_classifier`, as `checkpoint` and `weights`.
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
    """Load the checkpoint onto a device and return what it is to compute."""
    network, saved = load_classifier(job.model, job.checkpoint, weights=job.weights)
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


# Waiting for the slowest process of a long run is no failure.
_PATIENCE = timedelta(days=30)


class Torchrun:
    """The processes that torchrun started, on one machine or many; the folder must be on a disk of all.

    Attributes:
        rank: of this process.
        world_size: how many there are.
        local_rank: of this process on its machine.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def __enter__(self) -> "Torchrun":
        if self.world_size > 1:
            # Only to wait for each other: no tensor is exchanged, so gloo does on GPUs too.
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()


def run_processes(
    job: Job, parts: Sequence[int], device: str, devices: int, on_images: Callable[[int], None]
) -> None:
    """Share parts among processes of this machine, a device each, and wait for them.

    On a CPU the threads of this process are shared out too. When one process fails, the others are ended;
    when this one dies, they end themselves.

    Raises:
        UsageError: a process met one.
        LightspineError: a process failed or was killed; the parts that are done stay.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // devices)
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for rank in range(devices):
            receiver, sender = context.Pipe(duplex=False)
            share = spread(parts, rank, devices)
            arguments = (job, share, own_device(device, rank), threads, sender)
            process = context.Process(target=_work, args=arguments, name=f"worker {rank}")
            process.start()
            sender.close()
            processes[receiver] = process
        _listen(dict(processes), on_images)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _listen(processes: dict[Connection, SpawnProcess], on_images: Callable[[int], None]) -> None:
    while processes:
        for ready in wait(list(processes)):
            receiver = cast(Connection, ready)
            try:
                message: Any = receiver.recv()
            except EOFError:
                process = processes.pop(receiver)
                process.join()
                if process.exitcode:
                    raise LightspineError(
                        f"{process.name} {_how_it_ended(process.exitcode)}; what is done is kept, "
                        "and the run can be resumed"
                    ) from None
                continue
            if isinstance(message, int):
                on_images(message)
            else:
                kind, sentence = message
                raise (UsageError if kind == "usage" else LightspineError)(sentence)


def _work(job: Job, parts: Sequence[int], device: str, threads: int, sender: Connection) -> None:
    """Do one share. A key press is for the process that started this one, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        if parts:
            run_share(job, parts, device, on_images=sender.send, compute=load_compute(job, device))
    except UsageError as error:
        sender.send(("usage", str(error)))
    except LightspineError as error:
        sender.send(("failure", str(error)))
    except torch.OutOfMemoryError as error:
        sender.send(("failure", f"{device} has too little memory for this batch size: {error}"))
    sender.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        # Nobody is left to tell, and a part that is not written whole is not written.
        os._exit(1)


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"failed with status {status}"


def run_job(
    model: str | Path,
    data: str | Path,
    folder: RunFolder,
    output: TopClasses | Features,
    options: InferenceOptions,
) -> dict[str, Any]:
    """Do what `predict_images` and `embed_images` describe, with a folder and an output of their choice."""
    with Torchrun() as peers:
        if peers.world_size > 1 and options.devices > 1:
            raise UsageError(
                f"expected one device per process of torchrun, which started {peers.world_size}, "
                f"got {options.devices}"
            )
        device = own_device(options.device, peers.local_rank)
        for rank in range(options.devices):
            check_device(own_device(options.device, peers.local_rank + rank))
        if peers.rank == 0:
            folder.check(options.resume)
        network, saved = load_classifier(model, options.checkpoint, weights=options.weights)
        # Here also where other processes compute: a wrong stage is refused before they start.
        compute = output.prepare(network.to(device), saved)
        job = Job(
            model=str(model),
            checkpoint=None if options.checkpoint is None else str(options.checkpoint),
            weights=options.weights,
            data=str(data),
            preprocessing=find_preprocessing(
                saved, image_size=options.image_size, crop_pct=options.crop_pct, crop_mode=options.crop_mode
            ),
            output=output,
            folder=folder,
            batch_size=options.batch_size,
            part_size=options.part_size,
            num_workers=options.num_workers,
        )
        settings = _settings(job, saved.name)
        if peers.rank == 0:
            _prepare(job, settings)
        peers.meet()
        outcome = folder.outcome
        if outcome is None:
            outcome = _compute(job, compute, device, peers, options)
        elif peers.rank == 0:
            folder.tidy()
        return outcome


def _prepare(job: Job, settings: dict[str, Any]) -> None:
    """Fix what the run is to do and in which order, or see that it is what an earlier call has fixed."""
    folder = job.folder
    if folder.outcome is not None:
        folder.begin(settings)
        return
    if not folder.begun:
        # What a call left that was killed before it had fixed anything.
        folder.tidy()
    images = open_images(job.data, folder.parts)
    folder.begin(settings | {"images": len(images), "listing_sha256": hash_names(images)})


def _compute(
    job: Job,
    compute: Compute,
    device: str,
    peers: Torchrun,
    options: InferenceOptions,
) -> dict[str, Any]:
    """Do what is left to do, together with the other processes."""
    folder = job.folder
    total = int((folder.begun or {})["images"])
    parts = count_parts(total, job.part_size)
    pending = folder.pending(parts)
    # Every process has to see the same parts as left to do, so none may begin before all have looked.
    peers.meet()
    left = sum(len(places(number, job.part_size, total)) for number in pending)
    started = time.perf_counter()
    with _bar(options.progress and peers.rank == 0, total, total - left) as on_images:
        if options.devices > 1:
            run_processes(job, pending, options.device, options.devices, on_images)
        else:
            share = spread(pending, peers.rank, peers.world_size)
            run_share(job, share, device, on_images=on_images, compute=compute)
    peers.meet()
    seconds = time.perf_counter() - started
    if peers.rank == 0:
        folder.finish(
            parts,
            {
                "settings": folder.begun,
                "images": total,
                "computed": left,
                "seconds": round(seconds, 2),
                "images_per_second": round(left / seconds, 2),
                "checkpoint": job.checkpoint or job.model,
                "batch_size": options.batch_size,
                "device": describe_device(device),
                "devices": max(options.devices, peers.world_size),
                "threads": torch.get_num_threads(),
                "versions": describe_software(),
            },
        )
    peers.meet()
    return folder.outcome or {}


def _settings(job: Job, name: str) -> dict[str, Any]:
    """Return what must not change when a run is resumed."""
    return {
        "model": name,
        "checkpoint_sha256": hash_file(job.checkpoint or job.model),
        "weights": job.weights,
        "data": os.path.abspath(job.data),
        "preprocessing": job.preprocessing.to_dict(),
        "output": {"kind": type(job.output).__name__} | asdict(job.output),
        "file": job.folder.target.name,
        "part_size": job.part_size,
    }


@contextlib.contextmanager
def _bar(shown: bool, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on the standard error; the function that comes with it moves it on."""
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not shown) as progress:
        task = progress.add_task("images", total=total, completed=done)
        yield lambda count: progress.advance(task, count)


PREDICTION_FORMATS: dict[str, type] = {"csv": Csv, "parquet": Parquet}
FEATURE_FORMATS: dict[str, type] = {"npy": Npy, "parquet": Parquet}


def predict_images(
    model: str | Path,
    data: str | Path,
    folder: str | Path,
    *,
    topk: int = 5,
    format: str = "csv",
    options: InferenceOptions | None = None,
) -> dict[str, Any]:
    """Tell the likeliest classes of any number of images, each exactly once.

    Writes into the folder `predictions.csv` (or `.parquet`): path, class_1, name_1, probability_1, class_2,
    ...; `bad_images.csv`: path and reason of the images that could not be used; `run.json`: what was done.
    Rows are in the order of the listing, paths relative to `data` (of shards: SHARD/MEMBER).

    Args:
        model: a checkpoint file, or the name of a model together with `options.checkpoint`.
        data: a folder with images at any depth, or shards: a `.tar` file, a pattern such as
            `train-{000..012}.tar`, a folder of them.
        folder: where the files go; a new one, unless the run is resumed.
        topk: how many classes to tell; at most all.
        format: "csv" or "parquet" (needs pyarrow).
        options: how it is done.

    Returns:
        The content of `run.json`: `settings`, `images`, `bad`, and of the call that ended the run `computed`
        (images), `seconds`, `images_per_second`, `checkpoint`, `batch_size`, `device`, `devices`,
        `threads`, `versions`.

    Raises:
        UsageError: a wrong model, folder or value, or a run to resume that has other settings.
        LightspineError: the checkpoint cannot be read, a file cannot be written, a process died.
    """
    output_folder = RunFolder(folder, "predictions", find_format(format, PREDICTION_FORMATS))
    return run_job(model, data, output_folder, TopClasses(topk), options or InferenceOptions())


def embed_images(
    model: str | Path,
    data: str | Path,
    folder: str | Path,
    *,
    stages: Sequence[str | int] = ("pooled",),
    maps: bool = False,
    format: str = "npy",
    options: InferenceOptions | None = None,
) -> dict[str, Any]:
    """Compute the features of any number of images, each exactly once.

    Writes into the folder `features/COLUMN-PART.npy`, float32, (images of the part, channels), and
    `index.csv`: path, part, row; or one `features.parquet` with a list of fixed length per column. Else as
    `predict_images`.

    Args:
        model: a checkpoint file, or the name of a model together with `options.checkpoint`.
        data: see `predict_images`.
        folder: see `predict_images`.
        stages: "pooled" (the vector that the classifier takes), numbers of stages from 0 (their map, averaged
            over the image), or "all".
        maps: keep the stages' maps, (images of the part, channels, height, width); only as "npy".
        format: "npy" or "parquet" (needs pyarrow).
        options: how it is done.

    Returns:
        As `predict_images`.

    Raises:
        UsageError: as `predict_images`, and for an unknown stage.
        LightspineError: as `predict_images`.
    """
    if maps and format != "npy":
        raise UsageError(f"expected the format npy for maps, got {format}")
    name = "index" if format == "npy" else "features"
    output_folder = RunFolder(folder, name, find_format(format, FEATURE_FORMATS))
    output = Features(tuple(map(str, stages)), maps)
    return run_job(model, data, output_folder, output, options or InferenceOptions())
