"""Rank watchdog of distributed training: when one rank dies, hangs or is told to end, the others stop too.

The launchers do not cover all cases. torchrun stops only the ranks of its own node. Lightning's launcher
stops all ranks of a node when a child dies, but if rank 0 dies, its children wait for the timeout of a
collective, or forever if they hang elsewhere. At SIGTERM, Lightning's signal handler starts a collective, in
which a rank that alone received the signal waits for the others. While the ranks are being connected, Python
runs no signal handler at all.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightspine.utils.rank_monitor import RANK_TIMEOUT_S, RankMonitor, SignalPipe

_GRACE_S = 20.0
_TICK_S = 0.5
# An error of all ranks ends them within this time of each other.
_SHARED_S = 2.0
# Tells the ranks that Lightning starts which process they depend on.
_LAUNCHER_PID = "LIGHTSPINE_LAUNCHER_PID"


class RankWatchdog(pl.Callback):
    """Ends all ranks when one dies, hangs, or receives SIGTERM or SIGINT; see `RankMonitor`.

    Args:
        timeout_s: seconds after which a rank is given up that does not answer, or that is behind the others
            while no rank proceeds.

    Attributes:
        lost: a message about the rank that died or hangs, or None.

    Raises:
        UsageError: the timeout is not positive.
    """

    def __init__(self, timeout_s: float = RANK_TIMEOUT_S) -> None:
        self.lost: str | None = None
        self._monitor = RankMonitor(timeout_s, self._give_up, self._exit)
        self._noticed = threading.Event()
        self._stopping = False
        self._processes: list[Any] = []
        self._pipe: SignalPipe | None = None
        self._connected = threading.Event()
        self._connecting: threading.Thread | None = None

    @contextlib.contextmanager
    def signals_handled(self, trainer: pl.Trainer) -> Iterator[None]:
        """Handle SIGINT and SIGTERM to a rank of a distributed run, from before the ranks are connected.

        Until then a signal ends this rank, and so does the end of a rank that this one waits for.
        """
        in_main = threading.current_thread() is threading.main_thread()
        if trainer.num_devices * trainer.num_nodes == 1 or not in_main:
            yield
            return
        launcher = os.environ.get(_LAUNCHER_PID)
        if launcher is None:
            os.environ[_LAUNCHER_PID] = str(os.getpid())
        self._pipe = SignalPipe()
        # Ranks of torchrun or a cluster have other parents, which end them.
        is_child = launcher is not None and int(os.environ.get("LOCAL_RANK", "0")) > 0
        parent = int(launcher) if is_child and launcher is not None else None
        self._connecting = threading.Thread(
            target=self._watch_connecting, args=(trainer, self._pipe, parent), daemon=True
        )
        self._connecting.start()
        try:
            yield
        finally:
            self._stop_connecting()
            self._pipe.close()
            if launcher is None:
                os.environ.pop(_LAUNCHER_PID, None)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Connect the ranks; Lightning has already initialized the process group."""
        if trainer.world_size == 1:
            return
        self._monitor.connect(trainer.global_rank, trainer.world_size, trainer.strategy.broadcast)
        # The processes that Lightning's launcher started: ranks 1, 2, ... of this machine.
        self._processes = list(getattr(trainer.strategy.launcher, "procs", []))
        # Lightning registers its handler later. Its handler starts a collective wherever the rank is.
        trainer._signal_connector._sigterm_notifier_fn = lambda *_: None  # type: ignore[method-assign]
        # Lightning calls it on all ranks before every step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = (  # type: ignore[method-assign]
            lambda: self._agree_to_stop(trainer)
        )
        self._stop_connecting()
        self._monitor.watch(self._pipe)

    def on_train_batch_start(self, *_: Any) -> None:
        """Count the position in the run."""
        self._monitor.begin_step()

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the position in the run."""
        self._monitor.begin_step()

    def on_validation_batch_end(self, *_: Any) -> None:
        """Count the position in the run."""
        self._monitor.advance()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Count the position in the run: a rank with fewer images is not behind the others."""
        self._monitor.finish_step()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Send a goodbye message, so that this rank does not count as dead."""
        self._monitor.close(goodbye=True)

    def on_exception(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Close the connections, because the others cannot continue without this rank."""
        if self._stopping:
            self._monitor.close(goodbye=True)
        # If the exception results from the death of another rank, that death is reported instead.
        elif not self._noticed.wait(1.0 if self._monitor.is_connected else 0.0):
            self._monitor.close(goodbye=False)

    def explain(self, timeout_s: float) -> str | None:
        """Return the message about a rank that died or hangs, or None if there is none within `timeout_s`."""
        return self.lost if self._monitor.is_connected and self._noticed.wait(timeout_s) else None

    def _agree_to_stop(self, trainer: pl.Trainer) -> None:
        """End this rank at a step if rank 0 knows of a signal; called on all ranks at the same step."""
        self._monitor.begin_step()
        stop = torch.tensor([int(self._monitor.stop_since is not None)], device=trainer.strategy.root_device)
        dist.broadcast(stop, src=0)
        if stop.item():
            self._stopping = True
            raise SIGTERMException

    def _stop_connecting(self) -> None:
        self._connected.set()
        if self._connecting is not None:
            self._connecting.join()

    def _watch_connecting(self, trainer: pl.Trainer, pipe: SignalPipe, parent: int | None) -> None:
        """End this rank at a signal, or when the process ends that it waits for."""
        while not self._connected.is_set():
            readable, _, _ = select.select([pipe.reader], [], [], _TICK_S)
            if self._connected.is_set():
                # A signal that has arrived is left to the monitor.
                return
            received = pipe.read() if readable else None
            self._processes = list(getattr(trainer.strategy.launcher, "procs", []))
            if parent is not None:
                # At Ctrl-C the launching process ends this one.
                if os.getppid() != parent or received == signal.SIGTERM:
                    os._exit(128 + signal.SIGTERM)
            elif received is not None:
                self._exit(
                    f"training was interrupted by {received.name} before its ranks were connected",
                    128 + received,
                )
            else:
                ended = [n for n, process in enumerate(self._processes, 1) if process.poll() is not None]
                # An error that a rank shares with this one is reported by this one.
                if ended and not self._connected.wait(_SHARED_S):
                    self._exit(f"rank {ended[0]} ended before the ranks were connected", 1)

    def _give_up(self, rank: int, died: bool, message: str) -> None:
        """Report a rank that died or hangs, and end this rank if it does not end by itself."""
        self.lost = message
        sys.stderr.write(f"lightspine: {self.lost}; stopping this rank\n")
        sys.stderr.flush()
        self._noticed.set()
        # The end of a process that hangs ends the collective that waits for it.
        if not died and 0 < rank <= len(self._processes):
            self._processes[rank - 1].kill()
        # The next collective usually raises an error. A rank that hangs exits here.
        if not self._monitor.finished.wait(_GRACE_S):
            os._exit(1)

    def _exit(self, reason: str, status: int = 128 + signal.SIGTERM) -> None:
        sys.stderr.write(f"lightspine: {reason}; stopping this rank\n")
        sys.stderr.flush()
        for process in self._processes:
            process.kill()
        os._exit(status)
