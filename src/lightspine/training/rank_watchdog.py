"""Rank watchdog of distributed training: when one rank dies, hangs or is told to end, the others stop too.

The launchers do not cover all cases. torchrun stops only the ranks of its own node. Lightning's launcher
stops all ranks of a node when a child dies, but if rank 0 dies, its children wait for the timeout of a
collective, or forever if they hang elsewhere. At SIGTERM, Lightning's signal handler starts a collective, in
which a rank that alone received the signal waits for the others.
"""

import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightspine.errors import UsageError

RANK_TIMEOUT_S = 600.0
"""Seconds after which a rank that does not answer or does not proceed is given up, by default."""

# Messages between the ranks: a kind and a number.
_MESSAGE = struct.Struct(">cQ")
_GOODBYE = b"D"  # finished
_BEAT = b"B"  # position in the run
_LOST = b"L"  # number of the rank that died
_HUNG = b"H"  # number of the rank that does not answer
_STALLED = b"P"  # number of the rank that does not proceed
_STOP = b"S"  # number of the rank that received SIGTERM

_GRACE_S = 20.0
# A run that is told to end finishes its step; a rank that does not is ended.
_STOP_S = 40.0
_TICK_S = 1.0
# Position within validation; below it are the batches of validation, above it those of training.
_BATCHES = 2**20


class RankWatchdog(pl.Callback):
    """Connects each rank to rank 0 by TCP, to detect ranks that die, hang or receive SIGTERM.

    The operating system closes the connections of a process that dies. The others send a sign of life every
    second, with their position in the run; it is missing if a process is stopped or hangs in native code.

    Args:
        timeout_s: seconds after which a rank is given up that does not answer, or that is behind the others
            while no rank proceeds.

    Attributes:
        lost: a message about the rank that died or hangs, or None.

    Raises:
        UsageError: the timeout is not positive.
    """

    def __init__(self, timeout_s: float = RANK_TIMEOUT_S) -> None:
        if not timeout_s > 0:
            raise UsageError(f"expected a rank timeout above 0 seconds, received {timeout_s:g}")
        self.timeout_s = timeout_s
        self.lost: str | None = None
        self._noticed = threading.Event()
        self._finished = threading.Event()
        self._connections: dict[socket.socket, int] = {}
        self._send_lock = threading.Lock()
        self._rank = 0
        self._world_size = 1
        self._position = 0
        # By rank: its position in the run and when a sign of life came.
        self._positions: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._proceeded = 0.0
        self._buffers: dict[socket.socket, bytes] = {}
        self._stop_since: float | None = None
        self._stopping = False
        self._processes: list[Any] = []
        self._signals: tuple[socket.socket, socket.socket] | None = None
        self._wakeup_before = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Connect the ranks; Lightning has already initialized the process group."""
        if trainer.world_size == 1:
            return
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        server = None
        if self._rank == 0:
            server = socket.create_server(("", 0), backlog=self._world_size)
        port = trainer.strategy.broadcast(server.getsockname()[1] if server else None)
        if server is not None:
            for _ in range(self._world_size - 1):
                accepted, _ = server.accept()
                self._add(accepted, int.from_bytes(_receive(accepted, 4)))
            server.close()
        else:
            hub = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port))
            hub.sendall(self._rank.to_bytes(4))
            self._add(hub, 0)
        # The processes that Lightning's launcher started: ranks 1, 2, ... of this machine.
        self._processes = list(getattr(trainer.strategy.launcher, "procs", []))
        self._handle_sigterm(trainer)
        self._proceeded = time.monotonic()
        threading.Thread(target=self._watch, name="rank-watchdog", daemon=True).start()

    def on_train_batch_start(self, *_: Any) -> None:
        """Count the position in the run."""
        self._position = self._position // _BATCHES * _BATCHES + _BATCHES

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the position in the run."""
        self._position = self._position // _BATCHES * _BATCHES + _BATCHES

    def on_validation_batch_end(self, *_: Any) -> None:
        """Count the position in the run."""
        self._position += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Count the position in the run: a rank with fewer images is not behind the others."""
        self._position |= _BATCHES - 1

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Send a goodbye message, so that this rank does not count as dead."""
        self._close(_GOODBYE)

    def on_exception(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Close the connections, because the others cannot continue without this rank."""
        if self._stopping:
            self._close(_GOODBYE)
        # If the exception results from the death of another rank, that death is reported instead.
        elif not self._noticed.wait(1.0 if self._connections else 0.0):
            self._close(None)

    def explain(self, timeout_s: float) -> str | None:
        """Return the message about a rank that died or hangs, or None if there is none within `timeout_s`."""
        return self.lost if self._connections and self._noticed.wait(timeout_s) else None

    def _handle_sigterm(self, trainer: pl.Trainer) -> None:
        """Stop all ranks at the same step when one receives SIGTERM, in place of Lightning's handler."""
        # Lightning registers its handler later. Its handler starts a collective wherever the rank is.
        trainer._signal_connector._sigterm_notifier_fn = lambda *_: None  # type: ignore[method-assign]
        # Lightning calls it on all ranks before every step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = (  # type: ignore[method-assign]
            lambda: self._agree_to_stop(trainer)
        )
        if threading.current_thread() is threading.main_thread():
            # The thread reads the number of the signal even while the main thread waits in a collective.
            self._signals = socket.socketpair()
            for end in self._signals:
                end.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)

    def _agree_to_stop(self, trainer: pl.Trainer) -> None:
        """End this rank at a step if rank 0 knows of a SIGTERM; called on all ranks at the same step."""
        self._position = self._position // _BATCHES * _BATCHES + _BATCHES
        stop = torch.tensor([int(self._stop_since is not None)], device=trainer.strategy.root_device)
        dist.broadcast(stop, src=0)
        if stop.item():
            self._stopping = True
            raise SIGTERMException

    def _add(self, connection: socket.socket, rank: int) -> None:
        # A machine that loses power closes no connection: keep-alive probes find out within 40 seconds.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[connection] = rank
        self._heard[rank] = time.monotonic()
        self._positions[rank] = 0
        self._buffers[connection] = b""

    def _watch(self) -> None:
        """Exchange messages until the run is finished or a rank is lost."""
        with selectors.DefaultSelector() as selector:
            for peer in self._connections:
                selector.register(peer, selectors.EVENT_READ)
            if self._signals is not None:
                selector.register(self._signals[0], selectors.EVENT_READ)
            open_connections = set(self._connections)
            beat = 0.0
            while open_connections and not self._finished.is_set():
                for key, _ in selector.select(timeout=min(_TICK_S, self.timeout_s / 4)):
                    source: Any = key.fileobj
                    if self._finished.is_set():
                        return
                    if source not in self._connections:
                        self._read_signals(source)
                        continue
                    for kind, number in self._read(source):
                        if kind == _GOODBYE:
                            selector.unregister(source)
                            open_connections.discard(source)
                        elif self._handle(kind, number, self._connections[source]):
                            return
                now = time.monotonic()
                if now - beat >= min(_TICK_S, self.timeout_s / 4):
                    beat = now
                    self._send(_BEAT, self._position)
                if self._check_times(now, {self._connections[peer] for peer in open_connections}):
                    return

    def _read_signals(self, source: socket.socket) -> None:
        try:
            received = source.recv(64)
        except OSError:
            return
        if signal.SIGTERM in received:
            self._request_stop(self._rank)

    def _request_stop(self, rank: int) -> None:
        """Note that a rank received SIGTERM, and tell the others by way of rank 0."""
        if self._stop_since is None:
            self._stop_since = time.monotonic()
            self._send(_STOP, rank)

    def _read(self, connection: socket.socket) -> Iterator[tuple[bytes, int]]:
        """Yield the messages that have arrived; the loss of the rank if its connection was closed."""
        received = _receive_now(connection)
        if not received:
            yield _LOST, self._connections[connection]
            return
        data = self._buffers[connection] + received
        whole = len(data) // _MESSAGE.size * _MESSAGE.size
        self._buffers[connection] = data[whole:]
        yield from _MESSAGE.iter_unpack(data[:whole])

    def _handle(self, kind: bytes, number: int, sender: int) -> bool:
        """Handle a message; return whether a rank is lost."""
        self._heard[sender] = time.monotonic()
        if kind == _BEAT:
            if self._positions[sender] != number:
                self._proceeded = time.monotonic()
            self._positions[sender] = number
        elif kind == _STOP:
            self._request_stop(number)
        else:
            self._report(kind, number)
            return True
        return False

    def _check_times(self, now: float, ranks: set[int]) -> bool:
        """Report a rank that hangs; return whether there is one."""
        if self._stop_since is not None and now - self._stop_since > _STOP_S:
            self._exit(f"a rank received SIGTERM, and this one was not done {_STOP_S:.0f} seconds later")
        for rank in sorted(ranks):
            if now - self._heard[rank] > self.timeout_s:
                self._report(_HUNG, rank)
                return True
        if self._rank == 0:
            positions = {0: self._position} | {rank: self._positions[rank] for rank in ranks}
            if self._positions.get(0) != self._position:
                self._positions[0] = self._position
                self._proceeded = now
            behind = min(positions, key=lambda rank: (positions[rank], rank))
            stalled = now - self._proceeded > self.timeout_s
            if stalled and positions[behind] < max(positions.values()):
                self._report(_STALLED, behind)
                return True
        return False

    def _report(self, kind: bytes, rank: int) -> None:
        """Report a rank that died or hangs, and end this rank if it does not end by itself."""
        seconds = f"{self.timeout_s:g} seconds"
        what = {
            _LOST: "ended before the others",
            _HUNG: f"has not answered for {seconds}",
            _STALLED: f"has not proceeded for {seconds}, and the others wait for it",
        }[kind]
        self.lost = f"rank {rank} of {self._world_size} {what}"
        # Rank 0 tells the other ranks, which are connected to it only.
        self._send(kind, rank)
        sys.stderr.write(f"lightspine: {self.lost}; stopping this rank\n")
        sys.stderr.flush()
        self._noticed.set()
        # The end of a process that hangs ends the collective that waits for it.
        if kind != _LOST and 0 < rank <= len(self._processes):
            self._processes[rank - 1].kill()
        # The next collective usually raises an error. A rank that hangs exits here.
        if not self._finished.wait(_GRACE_S):
            os._exit(1)

    def _exit(self, reason: str) -> None:
        sys.stderr.write(f"lightspine: {reason}; stopping this rank\n")
        sys.stderr.flush()
        for process in self._processes:
            process.kill()
        os._exit(128 + signal.SIGTERM)

    def _close(self, kind: bytes | None) -> None:
        """Close the connections, with a last message or without one."""
        if self._finished.is_set():
            return
        if kind is not None:
            self._send(kind, 0)
        self._finished.set()
        if self._signals is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup_before)
        for connection in (*self._connections, *(self._signals or ())):
            connection.close()

    def _send(self, kind: bytes, number: int) -> None:
        with self._send_lock:
            for connection in self._connections:
                try:
                    connection.sendall(_MESSAGE.pack(kind, number))
                except OSError:
                    # That rank has died; `_watch` reports it.
                    continue


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("a rank ended while the ranks were being connected")
        data += part
    return data


def _receive_now(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:
        return b""
