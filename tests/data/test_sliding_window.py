"""Segmentation inference: whole image, sliding window, multi-scale and flip."""

import pytest
import torch
from torch import Tensor

from lightspine.data.segmentation import SlidingWindowInference, sliding_windows
from lightspine.errors import UsageError


def _by_pixel(images: Tensor) -> Tensor:
    """Network of per-pixel logits, which sliding windows must not change."""
    return torch.cat([images, -images], dim=1)


@pytest.mark.parametrize("size", [(512, 683), (300, 2000), (512, 512), (853, 513), (1, 1)])
@pytest.mark.parametrize("stride", [341, 512, 1])
def test_windows_cover_the_image_and_have_one_size(size: tuple[int, int], stride: int) -> None:
    if stride == 1:
        size = (min(size[0], 530), min(size[1], 530))
    seen = torch.zeros(size)
    for top, bottom, left, right in sliding_windows(size, (512, 512), (stride, stride)):
        assert (bottom - top, right - left) == (min(size[0], 512), min(size[1], 512))
        seen[top:bottom, left:right] = 1
    assert seen.all()


def test_windows_of_the_published_test() -> None:
    assert sliding_windows((512, 1000), (512, 512), (341, 341)) == [
        (0, 512, 0, 512),
        (0, 512, 341, 853),
        (0, 512, 488, 1000),
    ]


@pytest.mark.parametrize(
    "test",
    [
        SlidingWindowInference(window=(32, 24), stride=(20, 24)),
        SlidingWindowInference(flip=True),
        SlidingWindowInference(window=(200, 200), stride=(99, 99), flip=True),
    ],
    ids=["slide", "flip", "large window"],
)
def test_predict_by_pixel_is_the_same_however_the_image_is_cut(test: SlidingWindowInference) -> None:
    image = torch.randn(3, 61, 75)
    expected = _by_pixel(image[None]).softmax(1)[0]
    torch.testing.assert_close(test.predict(_by_pixel, image, (61, 75)), expected)


def test_predict_of_mirrors_averages_a_network_that_sees_sides() -> None:
    def sided(images: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, images.shape[3]).expand(len(images), 1, *images.shape[2:])
        return torch.cat([ramp, -ramp], dim=1)

    found = SlidingWindowInference(flip=True).predict(sided, torch.zeros(3, 40, 50), (40, 50))
    torch.testing.assert_close(found, torch.full((2, 40, 50), 0.5))


def test_predict_at_several_sizes_gives_the_size_that_was_asked_for() -> None:
    seen = []

    def network(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[2:]))
        return _by_pixel(images)

    found = SlidingWindowInference(ratios=(0.5, 1.0, 1.75)).predict(
        network, torch.randn(3, 40, 60), (80, 120)
    )
    assert seen == [(20, 30), (40, 60), (70, 105)]
    assert found.shape == (6, 80, 120)
    torch.testing.assert_close(found.sum(0), torch.ones(80, 120))


@pytest.mark.parametrize(
    "test",
    [
        SlidingWindowInference(ratios=()),
        SlidingWindowInference(ratios=(0.0,)),
        SlidingWindowInference(window=(32, 32), stride=(33, 1)),
        SlidingWindowInference(window=(32, 32), stride=(0, 1)),
    ],
)
def test_predict_with_a_value_out_of_range_is_refused(test: SlidingWindowInference) -> None:
    with pytest.raises(UsageError, match="expected"):
        test.predict(_by_pixel, torch.zeros(3, 32, 32), (32, 32))


@pytest.mark.parametrize(
    "test", [SlidingWindowInference(), SlidingWindowInference(ratios=(0.5, 1.0), flip=True)]
)
def test_classes_are_the_likeliest_ones(test: SlidingWindowInference) -> None:
    torch.manual_seed(0)
    image, weight = torch.randn(3, 33, 47), torch.randn(5, 3, 3, 3)

    def network(images: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(images, weight, padding=1)

    expected = test.predict(network, image, (50, 61)).argmax(0)
    assert torch.equal(test.classify(network, image, (50, 61)), expected)
