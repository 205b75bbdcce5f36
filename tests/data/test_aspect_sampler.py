"""AspectRatioSampler: batches of similar aspect ratio."""

import itertools
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from lightspine.data.loader import ResumableLoader, SeededDataset
from lightspine.data.samplers import AspectRatioSampler, EpochSampler
from lightspine.errors import UsageError

RATIOS = np.random.default_rng(0).uniform(0.5, 2.0, 103)


class Positions(Dataset[int]):
    """Dataset that returns the index and records the indices read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(RATIOS)

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


def _batches(sampler: AspectRatioSampler) -> list[list[int]]:
    order = list(sampler)
    return [order[i : i + sampler.batch_size] for i in range(0, len(order), sampler.batch_size)]


@pytest.mark.parametrize("bounds", [(1.0,), (0.7, 1.0, 1.5)])
def test_batches_mix_shapes_at_most_once_per_bound(bounds: tuple[float, ...]) -> None:
    batches = _batches(AspectRatioSampler(RATIOS, 8, bounds=bounds))
    mixed = [batch for batch in batches if len(set(np.searchsorted(bounds, RATIOS[batch]))) > 1]
    assert len(mixed) <= len(bounds)
    assert len(batches) == 13


def test_epoch_has_every_image_once() -> None:
    assert sorted(AspectRatioSampler(RATIOS, 8)) == list(range(len(RATIOS)))


def test_order_follows_seed_and_epoch() -> None:
    sampler = AspectRatioSampler(RATIOS, 8, seed=3)
    first = list(sampler)
    assert first == list(AspectRatioSampler(RATIOS, 8, seed=3))
    assert first != list(AspectRatioSampler(RATIOS, 8, seed=4))
    sampler.set_epoch(1)
    assert first != list(sampler)


def test_processes_have_the_images_of_the_plain_sampler() -> None:
    for rank in range(3):
        grouped = list(AspectRatioSampler(RATIOS, 8, num_replicas=3, rank=rank, seed=2))
        assert sorted(grouped) == sorted(EpochSampler(len(RATIOS), num_replicas=3, rank=rank, seed=2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_goes_on_in_the_middle_of_an_epoch(num_workers: int) -> None:
    def make() -> tuple[ResumableLoader, Positions]:
        dataset = Positions()
        options: dict[str, Any] = {"batch_size": 8, "num_workers": num_workers}
        sampler = AspectRatioSampler(RATIOS, 8, seed=1)
        loader = ResumableLoader(SeededDataset(dataset, 1), sampler=sampler, **options)
        sampler.set_epoch(2)
        return loader, dataset

    whole = [batch.tolist() for batch in make()[0]]
    loader, _ = make()
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    resumed, dataset = make()
    resumed.load_state_dict(loader.state_dict())
    assert [batch.tolist() for batch in resumed] == whole[5:]
    # Worker processes keep their own list.
    assert num_workers or sorted(dataset.read) == sorted(itertools.chain(*whole[5:])), (
        "images are not read again"
    )


@pytest.mark.parametrize(
    ("ratios", "options"),
    [([1.0, 0.0], {}), ([1.0], {"batch_size": 0}), ([1.0], {"bounds": (2.0, 1.0)}), ([], {})],
)
def test_sampler_with_a_value_out_of_range_is_refused(ratios: list[float], options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        AspectRatioSampler(ratios, **{"batch_size": 4} | options)
