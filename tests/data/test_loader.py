"""ResumableLoader: resuming in the middle of an epoch."""

import contextlib
import os
import signal
import time
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from lightspine.data.loader import ResumableLoader, SeededDataset, WatchedLoader
from lightspine.data.samplers import EpochSampler
from lightspine.errors import LightspineError, UsageError


class Noise(Dataset[torch.Tensor]):
    """Dataset of random items that counts its reads."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return index + torch.rand(1)


def _loader(dataset: Dataset | None = None, **options: Any) -> ResumableLoader:
    seeded = SeededDataset(dataset or Noise(), seed=3)
    return ResumableLoader(seeded, batch_size=4, sampler=EpochSampler(22, seed=3), **options)


def _epoch(loader: ResumableLoader, epoch: int) -> list[list[float]]:
    loader.sampler.set_epoch(epoch)
    return [batch.flatten().tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 5])
def test_restored_loader_gives_the_rest_of_the_epoch(num_workers: int, seen: int) -> None:
    whole = _epoch(_loader(), 2)
    first = _loader(num_workers=num_workers)
    first.sampler.set_epoch(2)
    batches = iter(first)
    for _ in range(seen):
        next(batches)
    again = _loader(num_workers=num_workers)
    again.load_state_dict(first.state_dict())
    assert _epoch(again, 2) == whole[seen:]


def test_restored_loader_does_not_read_what_was_seen() -> None:
    dataset = Noise()
    loader = _loader(dataset)
    loader.load_state_dict({"epoch": 0, "batch": 4})
    _epoch(loader, 0)
    assert len(dataset.read) == 22 - 16


def test_position_counts_the_whole_epoch_after_restoring() -> None:
    loader = _loader()
    loader.load_state_dict({"epoch": 0, "batch": 4})
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batch": 5}


def test_state_of_another_epoch_is_left_aside() -> None:
    loader = _loader()
    loader.load_state_dict({"epoch": 0, "batch": 6})
    assert _epoch(loader, 1) == _epoch(_loader(), 1)


def test_epoch_after_the_restored_one_is_whole() -> None:
    loader = _loader()
    loader.load_state_dict({"epoch": 0, "batch": 4})
    _epoch(loader, 0)
    assert _epoch(loader, 1) == _epoch(_loader(), 1)


def test_other_samplers_are_gone_through_to_the_position() -> None:
    options = {"batch_size": 4, "sampler": range(22)}
    loader = ResumableLoader(SeededDataset(Noise(), seed=3), **options)
    loader.load_state_dict({"epoch": 0, "batch": 4})
    whole = [batch.tolist() for batch in ResumableLoader(SeededDataset(Noise(), seed=3), **options)]
    assert [batch.tolist() for batch in loader] == whole[4:]


def test_persistent_workers_are_refused() -> None:
    with pytest.raises(UsageError, match="persistent_workers=False"):
        _loader(num_workers=1, persistent_workers=True)


class Deadly(Noise):
    """Dataset whose worker is killed at the ninth item."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_death_of_a_worker_stops_the_loader_though_its_own_error_is_swallowed() -> None:
    # The batches of the other worker are loaded already.
    batches = iter(WatchedLoader(Deadly(), batch_size=4, num_workers=2, prefetch_factor=2))

    def read_all() -> None:
        for _ in range(6):
            with contextlib.suppress(RuntimeError):
                time.sleep(0.3)
            next(batches)

    with pytest.raises(LightspineError, match=r"data loader worker .* was killed or crashed"):
        read_all()


class _Masks(Dataset[list[int]]):
    """Returns the signals that are blocked in the process that loads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[int]:
        return [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]


def test_workers_do_not_receive_interrupts() -> None:
    loader = WatchedLoader(_Masks(), batch_size=None, num_workers=1)
    assert all(signal.SIGINT in blocked for blocked in loader)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_start_where_signals_cannot_be_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
    loader = WatchedLoader([1, 2], batch_size=None, num_workers=1)
    assert list(loader) == [1, 2]
