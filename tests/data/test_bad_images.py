"""BadImageLog: when unreadable images stop a run."""

import pytest

from lightspine.data import BadImage, BadImageLog
from lightspine.errors import LightspineError, UsageError


def _bad(*numbers: int) -> list[BadImage]:
    return [BadImage(f"{number}.jpg", f"cannot read image {number}.jpg: cut off") for number in numbers]


def test_share_above_limit_stops_with_count_share_and_names() -> None:
    log = BadImageLog(0.1)
    log.start_epoch(200)
    log.add(_bad(*range(20)))
    with pytest.raises(
        LightspineError, match=r"21 of 200 images \(10\.5%\).*max_bad_share=0\.1.* 0\.jpg.* 2\.jpg"
    ):
        log.add(_bad(20))


def test_image_met_again_counts_once() -> None:
    log = BadImageLog(0.1)
    log.start_epoch(100)
    for _ in range(30):
        log.add(_bad(*range(10)))
    assert len(log.epoch_reasons) == 10


def test_every_epoch_counts_anew() -> None:
    log = BadImageLog(0.1)
    for epoch in range(3):
        log.start_epoch(100)
        log.add(_bad(*range(10 * epoch, 10 * epoch + 10)))
    assert len(log.epoch_reasons) == 10


def test_few_bad_images_never_stop_a_small_data_set() -> None:
    log = BadImageLog(0.1)
    log.start_epoch(12)
    log.add(_bad(*range(9)))
    assert len(log.epoch_reasons) == 9


def test_share_of_zero_still_allows_fewer_than_ten() -> None:
    log = BadImageLog(0.0)
    log.start_epoch(1000)
    log.add(_bad(*range(9)))
    with pytest.raises(LightspineError, match="10 of 1000"):
        log.add(_bad(9))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_share_outside_unit_interval_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="max_bad_share from 0 to 1"):
        BadImageLog(share)
