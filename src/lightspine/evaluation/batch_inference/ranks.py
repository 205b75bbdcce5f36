"""Distributed batch inference: launch ranks with torchrun's elastic agent, barrier, device of a rank."""

import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightspine.errors import LightspineError, UsageError
from lightspine.utils.interrupts import interrupts_blocked
from lightspine.utils.rank_monitor import RANK_TIMEOUT_S, RankMonitor

# Long enough to wait for the slowest rank; the agent handles ranks that die, and the monitor those that hang.
_BARRIER_TIMEOUT = timedelta(days=30)
_KEPT = "finished parts are kept: resume the run to continue"


@dataclass(frozen=True)
class Rank:
    """Rank of this process; rank 0 of 1 outside torchrun.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        local_rank: rank on this machine.
        monitor: finds ranks that hang; None outside `join_ranks` and if there is one rank.
    """

    rank: int
    world_size: int
    local_rank: int
    monitor: RankMonitor | None = None

    def barrier(self) -> None:
        """Wait until every rank has reached this point.

        Raises:
            LightspineError: another rank has ended.
        """
        if self.world_size == 1:
            return
        self.wait_is_allowed()
        try:
            dist.barrier()
        except RuntimeError as error:
            raise LightspineError(f"another rank of this run ended early; {_KEPT}") from error
        if self.monitor is not None:
            self.monitor.begin_step()

    def wait_is_allowed(self) -> None:
        """Suspend the timeout of this rank until the next barrier, for work of unknown duration."""
        if self.monitor is not None:
            self.monitor.finish_step()

    def proceed(self) -> None:
        """Tell the others that this rank has done a part of its work."""
        if self.monitor is not None:
            self.monitor.advance()

    def device(self, device: str) -> str:
        """Return the device of this rank; "cuda" gives every rank of a machine its own GPU."""
        return f"cuda:{self.local_rank}" if device == "cuda" else device


def read_rank() -> Rank:
    """Read the rank from the environment variables that torchrun sets."""
    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return Rank(rank, world_size, local_rank)


@contextmanager
def join_ranks(timeout_s: float = RANK_TIMEOUT_S) -> Iterator[Rank]:
    """Initialize the process group under torchrun; outside torchrun there is none.

    Args:
        timeout_s: seconds after which a rank that hangs ends the run; see `RankMonitor`.
    """
    rank = read_rank()
    if rank.world_size == 1:
        yield rank
        return
    # Gloo suffices on GPUs too: only barriers are used, no tensors.
    dist.init_process_group("gloo", timeout=_BARRIER_TIMEOUT)
    monitor = RankMonitor(timeout_s, _give_up)
    monitor.connect(rank.rank, rank.world_size, _broadcast)
    monitor.watch()
    try:
        yield replace(rank, monitor=monitor)
    finally:
        monitor.close(goodbye=True)
        dist.destroy_process_group()


def _broadcast(value: int | None) -> int:
    values = [value]
    dist.broadcast_object_list(values)
    assert values[0] is not None
    return values[0]


def _give_up(rank: int, died: bool, message: str) -> None:  # noqa: ARG001
    """End this rank, which may wait for one that hangs; the agent reads the message from the error file."""
    if died:
        # torchrun's agent knows of what, and ends the others.
        return
    # Importing it takes half a second.
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(LightspineError(f"{message}; {_KEPT}"))
    os._exit(1)


def launch_ranks(function: Callable[..., Any], *args: Any, ranks: int) -> Any:
    """Run a function in several processes of this machine, as `torchrun --standalone` does.

    When a rank fails, torchrun's agent ends the others; when this process dies, the ranks end themselves.
    SIGINT and SIGTERM end all of them without a word.

    Args:
        function: module-level function; `join_ranks` inside it joins the process group.
        *args: its arguments, which are pickled.
        ranks: number of processes.

    Returns:
        The return value of rank 0.

    Raises:
        UsageError: raised by a rank.
        LightspineError: raised by a rank, or a rank failed or was killed.
        InterruptedRunError: this process received SIGTERM, SIGHUP or SIGQUIT.
        KeyboardInterrupt: this process was interrupted.
    """
    # Importing these takes half a second.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="lightspine-") as log_dir, _quiet_agent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
        )
        try:
            with _interrupts_for_this_process():
                return elastic_launch(config, _run_rank)(function, *args)[0]
        except ChildFailedError as error:
            raise _as_lightspine_error(error.get_first_failure()[1]) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise InterruptedRunError(error.sigval) from None


class InterruptedRunError(LightspineError):
    """A signal ended the run."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"the run was ended by {number.name}; {_KEPT}")
        self.exit_status = 128 + number


def _run_rank(function: Callable[..., Any], *args: Any) -> Any:
    """Run the function of a rank, which SIGINT ends without a traceback, as does the death of the agent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return function(*args)


@contextmanager
def _interrupts_for_this_process() -> Iterator[None]:
    """Start ranks with SIGINT blocked, while a thread of this process keeps receiving it.

    The Python handler of the signal runs in the main thread as usual.
    """
    finished = threading.Event()
    threading.Thread(target=finished.wait, daemon=True).start()
    try:
        with interrupts_blocked():
            yield
    finally:
        finished.set()


def _as_lightspine_error(failure: Any) -> LightspineError:
    """Convert the failure of a rank, as read by the agent from its error file, to an exception."""
    if failure.exitcode < 0:
        return LightspineError(f"rank {failure.local_rank} was killed by {failure.signal_name()}; {_KEPT}")
    details = failure.error_file_data.get("message", {})
    kind, _, sentence = (details.get("message", "") if isinstance(details, dict) else "").partition(": ")
    for known in (UsageError, LightspineError):
        if kind == known.__name__:
            return known(sentence)
    reason = f"{kind}: {sentence}" if kind else f"exit status {failure.exitcode}"
    return LightspineError(f"rank {failure.local_rank} failed with {reason}; {_KEPT}")


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Silence the agent's log, which repeats the raised error, and restore the signal handlers on exit."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing")]
    silence = logging.NullHandler()
    for logger in loggers:
        logger.addHandler(silence)
        logger.propagate = False
    # The agent sets signal handlers in the main thread only: Python allows it nowhere else.
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in signals} if in_main_thread else {}
    try:
        yield
    finally:
        for logger in loggers:
            logger.propagate = True
            logger.removeHandler(silence)
        for number, handler in handlers.items():
            signal.signal(number, handler)
