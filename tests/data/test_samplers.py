"""EpochSampler: the order equals torch's and timm's and depends on (seed, epoch, rank) only."""

from collections import Counter

import pytest
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from lightspine.data.samplers import EpochSampler
from lightspine.errors import UsageError


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("length", "replicas"), [(10, 1), (10, 3), (2, 5)])
def test_order_equals_torchs_distributed_sampler(length: int, replicas: int, shuffle: bool) -> None:
    for rank in range(replicas):
        ours = EpochSampler(length, num_replicas=replicas, rank=rank, seed=5, shuffle=shuffle)
        torchs = DistributedSampler(range(length), replicas, rank, shuffle=shuffle, seed=5)
        for epoch in (0, 3):
            ours.set_epoch(epoch)
            torchs.set_epoch(epoch)
            assert list(ours) == list(torchs)
        assert len(ours) == len(torchs)


@pytest.mark.parametrize(("length", "replicas"), [(100, 1), (100, 4), (600, 4), (513, 8)])
def test_repeats_equal_timms_repeated_augmentation(length: int, replicas: int) -> None:
    for rank in range(replicas):
        ours = EpochSampler(length, num_replicas=replicas, rank=rank, seed=0, repeats=3)
        timms = RepeatAugSampler(range(length), replicas, rank, num_repeats=3)
        for epoch in (0, 2):
            ours.set_epoch(epoch)
            timms.set_epoch(epoch)
            assert [image for image, _ in ours] == list(timms)
        assert len(ours) == len(timms)


def test_copies_of_an_image_have_different_repeats_on_different_replicas() -> None:
    seen = [pair for rank in range(3) for pair in EpochSampler(30, num_replicas=3, rank=rank, repeats=3)]
    assert len(set(seen)) == len(seen) == 30


def test_start_at_skips_once() -> None:
    sampler = EpochSampler(20, num_replicas=2, rank=1, seed=1, repeats=2)
    whole = list(sampler)
    sampler.start_at(4)
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


def test_start_at_the_end_gives_nothing() -> None:
    sampler = EpochSampler(5)
    sampler.start_at(5)
    assert list(sampler) == []


def test_num_samples_shortens_the_epoch() -> None:
    sampler = EpochSampler(100, num_samples=7)
    assert len(sampler) == len(list(sampler)) == 7


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("length", "size"), [(3, 10), (10, 4), (10, 10)])
def test_epochs_of_a_given_size_use_every_image_equally_often(length: int, size: int, replicas: int) -> None:
    samplers = [EpochSampler(length, num_replicas=replicas, rank=i, epoch_size=size) for i in range(replicas)]
    counts: Counter[int] = Counter()
    for epoch in range(length):
        pairs = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert len(sampler) == size // replicas
            pairs += list(sampler)
        assert len(set(pairs)) == size  # an image that comes twice in an epoch gets another augmentation
        counts.update(image for image, _ in pairs)
    assert set(counts.values()) == {size}


def test_an_epoch_of_all_images_has_the_usual_order() -> None:
    usual, sized = EpochSampler(10, seed=3), EpochSampler(10, seed=3, epoch_size=10)
    for epoch in (0, 4):
        usual.set_epoch(epoch)
        sized.set_epoch(epoch)
        assert [image for image, _ in sized] == list(usual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "at least 1 image, got 0"),
        ({"length": 5, "repeats": 0}, "repeats of at least 1, got 0"),
        ({"length": 5, "num_replicas": 2, "rank": 2}, "a rank from 0 to 1, got 2"),
        ({"length": 5, "num_samples": 6}, "num_samples from 1 to 5, got 6"),
        ({"length": 5, "epoch_size": 0}, "an epoch of at least 1 image, got 0"),
        ({"length": 5, "epoch_size": 9, "repeats": 3}, "no repeats with an epoch size, got .* repeats=3"),
    ],
)
def test_wrong_argument_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EpochSampler(**options)
