"""A whole run: prepare its folder, share the work, join what came of it."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightspine.errors import UsageError
from lightspine.evaluation.bulk.folder import RunFolder
from lightspine.evaluation.bulk.launch import Torchrun, run_processes
from lightspine.evaluation.bulk.listing import hash_names, open_images
from lightspine.evaluation.bulk.options import InferenceOptions
from lightspine.evaluation.bulk.outputs import Compute, Features, TopClasses
from lightspine.evaluation.bulk.worker import Job, count_parts, own_device, places, run_share, spread
from lightspine.evaluation.networks import find_preprocessing, load_network
from lightspine.evaluation.report import describe_device, describe_software, hash_file
from lightspine.utils.devices import check_device


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
        network, saved = load_network(model, options.checkpoint, weights=options.weights)
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
