"""Several processes of one run: when one dies, the others end with a sentence and do not hang."""

import os
import selectors
import socket
import sys
import threading
from typing import Any

import lightning.pytorch as pl

_FAREWELL = b"done"
_GRACE_S = 20.0


class RankWatchdog(pl.Callback):
    """Connects every process with the first one; a connection that breaks tells of a death at once.

    The operating system closes the connections of a process that is killed. Without this, a process that
    waits for a dead one in a collective operation waits for a time-out of many minutes.

    Attributes:
        lost: a sentence about the process that died, or None.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self._noticed = threading.Event()
        self._finished = threading.Event()
        self._connections: dict[socket.socket, int] = {}
        self._lock = threading.Lock()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Connect the processes; Lightning has joined them into a group by now."""
        if trainer.world_size == 1:
            return
        rank, world_size = trainer.global_rank, trainer.world_size
        server = None
        if rank == 0:
            server = socket.create_server(("", 0), backlog=world_size)
        port = trainer.strategy.broadcast(server.getsockname()[1] if server else None)
        if server is not None:
            for _ in range(world_size - 1):
                accepted, _ = server.accept()
                self._add(accepted, int.from_bytes(_read(accepted, 4)))
            server.close()
        else:
            hub = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port))
            hub.sendall(rank.to_bytes(4))
            self._add(hub, 0)
        thread = threading.Thread(target=self._watch, args=(world_size,), name="peer-watch", daemon=True)
        thread.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Say farewell, so that the end of this process is not taken for a death."""
        self._close(_FAREWELL)

    def on_exception(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Break the connections: the others cannot go on without this process."""
        if not self._noticed.wait(1.0 if self._connections else 0.0):
            self._close(b"")

    def explain(self, timeout_s: float) -> str | None:
        """Return the sentence about a death, for which it waits a little."""
        return self.lost if self._connections and self._noticed.wait(timeout_s) else None

    def _add(self, connection: socket.socket, rank: int) -> None:
        # A machine that loses its power closes nothing: the system asks it, and gives up after 40 seconds.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[connection] = rank

    def _watch(self, world_size: int) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            open_ends = len(self._connections)
            while open_ends and not self._finished.is_set():
                for key, _ in selector.select(timeout=1.0):
                    end: Any = key.fileobj
                    if self._finished.is_set():
                        return
                    message = _read_now(end)
                    if message.startswith(_FAREWELL):
                        selector.unregister(end)
                        open_ends -= 1
                        continue
                    dead = int.from_bytes(message) if message else self._connections[end]
                    self._mourn(dead, world_size)
                    return

    def _mourn(self, dead: int, world_size: int) -> None:
        self.lost = f"process {dead} of {world_size} (counted from 0) ended before the others"
        # The first process passes the news on.
        self._send(dead.to_bytes(4))
        sys.stderr.write(f"lightspine: {self.lost}; stopping this one\n")
        sys.stderr.flush()
        self._noticed.set()
        # The training meets an error of its own where the communication notices; elsewhere it hangs.
        if not self._finished.wait(_GRACE_S):
            os._exit(1)

    def _close(self, message: bytes) -> None:
        if self._finished.is_set():
            return
        self._send(message)
        self._finished.set()
        for connection in self._connections:
            connection.close()

    def _send(self, message: bytes) -> None:
        with self._lock:
            for connection in self._connections:
                try:
                    connection.sendall(message)
                except OSError:
                    # That one is gone already; whoever watches it is told by its own end.
                    continue


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("a process ended while the processes were being connected")
        data += part
    return data


def _read_now(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4)
    except OSError:
        return b""
