"""Rank watchdog: a rank that dies, hangs or receives SIGTERM is noticed by the others."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightspine.errors import UsageError
from lightspine.training.rank_watchdog import RankWatchdog

Trainer: Any = SimpleNamespace


def _trainer(rank: int, ports: "list[int]", known: threading.Event) -> Any:
    """Return what the watchdog needs of a trainer; rank 0 broadcasts the port."""

    def broadcast(port: int | None) -> int:
        if port is not None:
            ports.append(port)
            known.set()
        assert known.wait(10)
        return ports[0]

    strategy = Trainer(broadcast=broadcast, launcher=None, root_device=torch.device("cpu"))
    loop = Trainer(epoch_loop=Trainer())
    return Trainer(
        world_size=2,
        num_devices=2,
        num_nodes=1,
        global_rank=rank,
        strategy=strategy,
        fit_loop=loop,
        _signal_connector=Trainer(),
    )


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RankWatchdog, RankWatchdog, Any]]:
    """Two connected ranks in one process, of which rank 1 receives its signals, and the trainer of rank 0."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    ports: list[int] = []
    known = threading.Event()
    trainers = [_trainer(rank, ports, known) for rank in (0, 1)]
    watchdogs = RankWatchdog(timeout_s=0.6), RankWatchdog(timeout_s=0.6)
    module: Any = None
    first = threading.Thread(target=watchdogs[0].setup, args=(trainers[0], module, "fit"))
    first.start()
    with watchdogs[1].signals_handled(trainers[1]):
        watchdogs[1].setup(trainers[1], module, "fit")
        first.join()
        yield *watchdogs, trainers[0]
        for watchdog, trainer in zip(watchdogs, trainers, strict=True):
            watchdog.teardown(trainer, module, "fit")
    dist.destroy_process_group()


def _step(trainer: Any) -> None:
    """Do what Lightning does before every step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()


def _is_stopped(trainer: Any) -> bool:
    try:
        _step(trainer)
    except SIGTERMException:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_one_rank_ends_the_next_step_of_rank_0(
    ranks: tuple[RankWatchdog, RankWatchdog, Any], number: signal.Signals
) -> None:
    *_, trainer = ranks
    assert not _is_stopped(trainer)
    os.kill(os.getpid(), number)
    # The signal travels from rank 1 to rank 0 in a moment.
    assert any(_is_stopped(trainer) or time.sleep(0.01) for _ in range(1000))


def test_ranks_that_proceed_together_are_not_given_up(
    ranks: tuple[RankWatchdog, RankWatchdog, Any],
) -> None:
    first, second, _ = ranks
    for watchdog in (first, second):
        watchdog.on_train_batch_end()
    assert first.explain(1.5) is None
    assert second.explain(0.0) is None


def test_rank_that_is_behind_is_named_on_all_ranks(ranks: tuple[RankWatchdog, RankWatchdog, Any]) -> None:
    first, second, _ = ranks
    first.on_train_batch_start()
    message = "rank 1 of 2 has not proceeded for 0.6 seconds, and the others wait for it"
    assert first.explain(10) == message
    assert second.explain(10) == message


def test_rank_without_a_sign_of_life_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ports: list[int] = []
    known = threading.Event()
    trainer, watchdog = _trainer(0, ports, known), RankWatchdog(timeout_s=0.5)
    module: Any = None
    setup = threading.Thread(target=watchdog.setup, args=(trainer, module, "fit"))
    setup.start()
    assert known.wait(10)
    with socket.create_connection(("127.0.0.1", ports[0])) as silent:
        silent.sendall((1).to_bytes(4))
        setup.join()
        assert watchdog.explain(10) == "rank 1 of 2 has not answered for 0.5 seconds"
        watchdog.teardown(trainer, module, "fit")


def test_timeout_must_be_positive() -> None:
    with pytest.raises(UsageError, match="expected a rank timeout above 0 seconds, received 0"):
        RankWatchdog(timeout_s=0)
