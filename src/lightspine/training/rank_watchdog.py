"""Rank watchdog of distributed training: when one rank dies, the others stop with a message.

The launchers do not cover all cases. torchrun stops only the ranks of its own node. Lightning's launcher
stops all ranks of a node when a child dies, but if rank 0 dies, its children wait for the timeout of a
collective, or forever if they hang elsewhere.
"""

import os
import selectors
import socket
import sys
import threading
from typing import Any

import lightning.pytorch as pl

_GOODBYE = b"done"
_GRACE_S = 20.0


class RankWatchdog(pl.Callback):
    """Detects the death of a rank by a TCP connection to rank 0, which the operating system then closes.

    Attributes:
        lost: a message about the rank that died, or None.
    """

    def __init__(self) -> None:
        self.lost: str | None = None
        self._noticed = threading.Event()
        self._finished = threading.Event()
        self._connections: dict[socket.socket, int] = {}
        self._send_lock = threading.Lock()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Connect the ranks; Lightning has already initialized the process group."""
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
                self._add(accepted, int.from_bytes(_receive(accepted, 4)))
            server.close()
        else:
            hub = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port))
            hub.sendall(rank.to_bytes(4))
            self._add(hub, 0)
        thread = threading.Thread(target=self._watch, args=(world_size,), name="rank-watchdog", daemon=True)
        thread.start()

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
        # If the exception results from the death of another rank, that death is reported instead.
        if not self._noticed.wait(1.0 if self._connections else 0.0):
            self._close(b"")

    def explain(self, timeout_s: float) -> str | None:
        """Return the message about a rank that died, or None if none dies within `timeout_s`."""
        return self.lost if self._connections and self._noticed.wait(timeout_s) else None

    def _add(self, connection: socket.socket, rank: int) -> None:
        # A machine that loses power closes no connection: keep-alive probes find out within 40 seconds.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[connection] = rank

    def _watch(self, world_size: int) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._connections:
                selector.register(peer, selectors.EVENT_READ)
            open_connections = len(self._connections)
            while open_connections and not self._finished.is_set():
                for key, _ in selector.select(timeout=1.0):
                    connection: Any = key.fileobj
                    if self._finished.is_set():
                        return
                    message = _receive_now(connection)
                    if message.startswith(_GOODBYE):
                        selector.unregister(connection)
                        open_connections -= 1
                        continue
                    dead = int.from_bytes(message) if message else self._connections[connection]
                    self._report_death(dead, world_size)
                    return

    def _report_death(self, dead: int, world_size: int) -> None:
        self.lost = f"rank {dead} of {world_size} ended before the others"
        # Rank 0 tells the other ranks, which are connected to it only.
        self._send(dead.to_bytes(4))
        sys.stderr.write(f"lightspine: {self.lost}; stopping this rank\n")
        sys.stderr.flush()
        self._noticed.set()
        # The next collective usually raises an error. A rank that hangs exits here.
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
        with self._send_lock:
            for connection in self._connections:
                try:
                    connection.sendall(message)
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
        return connection.recv(4)
    except OSError:
        return b""
