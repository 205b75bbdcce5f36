"""The processes of a run: this one, several that it starts, or those that torchrun started."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, cast

import torch
import torch.distributed as dist

from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.bulk.worker import Job, load_compute, own_device, run_share, spread

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
