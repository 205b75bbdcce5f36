"""Monitor of the ranks of a distributed run: notices ranks that die, hang or are told to end.

Each rank is connected to rank 0 by TCP. The operating system closes the connections of a process that dies.
The others send a heartbeat every second, with their position in the run; it is missing if a process is
stopped or hangs in native code.
"""

import os
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

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
_STOP = b"S"  # number of the rank that received a signal

# A run that is told to end finishes its step; a rank that does not is ended.
_STOP_S = 40.0
_TICK_S = 1.0
# Parts of a step, such as batches of validation; above them is the number of the step.
_PARTS = 2**20


class RankMonitor:
    """Exchanges heartbeats with the other ranks in a thread.

    Args:
        timeout_s: seconds after which a rank is given up that does not answer, or that is behind the others
            while no rank proceeds.
        on_lost: called in the thread with the rank, whether it died (or hangs), and a message.
        on_stuck: called in the thread with a message when this rank was told to stop and did not.

    Attributes:
        stop_since: when a rank received a signal to end, or None.

    Raises:
        UsageError: the timeout is not positive.
    """

    def __init__(
        self,
        timeout_s: float,
        on_lost: Callable[[int, bool, str], None],
        on_stuck: Callable[[str], None] | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise UsageError(f"expected a rank timeout above 0 seconds, received {timeout_s:g}")
        self.timeout_s = timeout_s
        self.stop_since: float | None = None
        self.finished = threading.Event()
        self._on_lost = on_lost
        self._on_stuck = on_stuck
        self._connections: dict[socket.socket, int] = {}
        self._send_lock = threading.Lock()
        self._rank = 0
        self._world_size = 1
        self._position = 0
        # By rank: its position in the run and when a heartbeat came.
        self._positions: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._proceeded = 0.0
        self._buffers: dict[socket.socket, bytes] = {}
        self._signals: SignalPipe | None = None

    @property
    def is_connected(self) -> bool:
        """Whether there are other ranks."""
        return bool(self._connections)

    def connect(self, rank: int, world_size: int, broadcast: Callable[[Any], Any]) -> None:
        """Connect the ranks; all of them call it.

        Args:
            rank: of this process.
            world_size: number of ranks.
            broadcast: sends a value from rank 0 to all ranks and returns it.
        """
        self._rank, self._world_size = rank, world_size
        server = None
        if rank == 0:
            server = socket.create_server(("", 0), backlog=world_size)
        port = broadcast(server.getsockname()[1] if server else None)
        if server is not None:
            for _ in range(world_size - 1):
                accepted, _ = server.accept()
                self._add(accepted, int.from_bytes(_receive(accepted, 4)))
            server.close()
        else:
            hub = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port))
            hub.sendall(rank.to_bytes(4))
            self._add(hub, 0)

    def watch(self, signals: "SignalPipe | None" = None) -> None:
        """Start the monitoring thread, which sends and receives heartbeats.

        Args:
            signals: pipe of signals that tell all ranks to stop.
        """
        self._signals = signals
        self._proceeded = time.monotonic()
        threading.Thread(target=self._watch, name="rank-monitor", daemon=True).start()

    def begin_step(self) -> None:
        """Count a step."""
        self._position = self._position // _PARTS * _PARTS + _PARTS

    def advance(self) -> None:
        """Count a part of a step, such as a batch."""
        self._position += 1

    def finish_step(self) -> None:
        """Count this step as finished: a rank with less to do is not behind the others."""
        self._position |= _PARTS - 1

    def close(self, *, goodbye: bool) -> None:
        """Close the connections.

        Args:
            goodbye: say that this rank has finished; otherwise it counts as dead.
        """
        if self.finished.is_set():
            return
        if goodbye:
            self._send(_GOODBYE, 0)
        self.finished.set()
        for connection in self._connections:
            connection.close()

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
                selector.register(self._signals.reader, selectors.EVENT_READ)
            open_connections = set(self._connections)
            beat = 0.0
            while open_connections and not self.finished.is_set():
                for key, _ in selector.select(timeout=min(_TICK_S, self.timeout_s / 4)):
                    source: Any = key.fileobj
                    if self.finished.is_set():
                        return
                    if source not in self._connections:
                        self._read_signals()
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

    def _read_signals(self) -> None:
        if self._signals is not None and self._signals.read():
            self._request_stop(self._rank)

    def _request_stop(self, rank: int) -> None:
        """Note that a rank received a signal, and tell the others by way of rank 0."""
        if self.stop_since is None:
            self.stop_since = time.monotonic()
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
        if self.stop_since is not None and self._on_stuck is not None and now - self.stop_since > _STOP_S:
            self._on_stuck(f"a rank was told to end, and this one was not done {_STOP_S:.0f} seconds later")
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
        """Report a rank that died or hangs to the other ranks, which are connected to rank 0 only."""
        seconds = f"{self.timeout_s:g} seconds"
        what = {
            _LOST: "ended before the others",
            _HUNG: f"has not answered for {seconds}",
            _STALLED: f"has not proceeded for {seconds}, and the others wait for it",
        }[kind]
        self._send(kind, rank)
        self._on_lost(rank, kind == _LOST, f"rank {rank} of {self._world_size} {what}")

    def _send(self, kind: bytes, number: int) -> None:
        with self._send_lock:
            for connection in self._connections:
                try:
                    connection.sendall(_MESSAGE.pack(kind, number))
                except OSError:
                    # That rank has died; `_watch` reports it.
                    continue


class SignalPipe:
    """Self-pipe for SIGINT and SIGTERM: a thread reads them even while the main thread is in native code.

    Created and closed in the main thread. The signals do nothing else until it is closed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        for end in (self.reader, self._writer):
            end.setblocking(False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def read(self) -> signal.Signals | None:
        """Return the SIGINT or SIGTERM that has arrived, if any."""
        try:
            received = self.reader.recv(64)
        except OSError:
            return None
        return next((number for number in self.SIGNALS if number in received), None)

    def close(self) -> None:
        """Restore the handlers; in another thread than the main one, Python does not allow it."""
        if self._writer.fileno() != -1 and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._handlers.items():
                # None: the handler was not installed by Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.reader.close()
        self._writer.close()


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
