import pytest
import torch

from lightspine.errors import UsageError
from lightspine.heads import RescaledMaps, SimpleFeaturePyramid


def test_levels_of_a_published_image_have_their_strides():
    pyramid = SimpleFeaturePyramid(32, channels=16)
    levels = pyramid([torch.randn(1, 32, 64, 64)])
    sizes = {stride: tuple(x.shape[1:]) for stride, x in levels.items()}
    assert sizes == {
        "4": (16, 256, 256),
        "8": (16, 128, 128),
        "16": (16, 64, 64),
        "32": (16, 32, 32),
        "64": (16, 16, 16),
    }


def test_finest_level_halves_the_width_twice_with_norm_and_gelu_between():
    first, norm, act, second, *_ = SimpleFeaturePyramid(32, channels=16).levels[0]
    assert (first.out_channels, second.out_channels) == (16, 8)
    assert norm.weight.numel() == 16
    assert isinstance(act, torch.nn.GELU)


def test_smallest_map_survives_pooling():
    levels = SimpleFeaturePyramid(8, channels=8)([torch.randn(1, 8, 1, 1)])
    assert [tuple(x.shape[2:]) for x in levels.values()] == [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]


def test_rescaled_maps_have_the_strides_of_a_stage_backbone():
    rescaled = RescaledMaps(8)([torch.randn(2, 8, 32, 32) for _ in range(4)])
    assert [tuple(x.shape[1:]) for x in rescaled] == [(8, 128, 128), (8, 64, 64), (8, 32, 32), (8, 16, 16)]


def test_map_of_the_same_stride_is_left_alone():
    maps = [torch.randn(2, 8, 8, 8) for _ in range(4)]
    assert torch.equal(RescaledMaps(8)(maps)[2], maps[2])


@pytest.mark.parametrize("pyramid", [SimpleFeaturePyramid, RescaledMaps])
def test_stride_that_no_doubling_reaches_is_refused(pyramid):
    with pytest.raises(UsageError, match="a map of stride 14 cannot be resized to stride 4"):
        pyramid(8, 14)
