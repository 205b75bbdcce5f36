from collections import OrderedDict

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from lightspine.errors import UsageError
from lightspine.heads import FeaturePyramid


def make_maps(channels, strides, size=(100, 164)):
    return [
        torch.randn(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(channels, strides, strict=True)
    ]


def test_plain_pyramid_equals_torchvisions():
    channels, strides = (8, 16, 24), (4, 8, 16)
    ours = FeaturePyramid(channels, strides, channels=32, coarser=1)
    theirs = FeaturePyramidNetwork(list(channels), 32, extra_blocks=LastLevelMaxPool())
    for i in range(3):
        theirs.inner_blocks[i][0].load_state_dict(ours.laterals[i].state_dict())
        theirs.layer_blocks[i][0].load_state_dict(ours.smooths[i].state_dict())
    maps = make_maps(channels, strides)
    expected = theirs(OrderedDict((str(i), x) for i, x in enumerate(maps)))
    levels = ours(maps)
    assert list(levels) == ["4", "8", "16", "32"]
    for x, y in zip(levels.values(), expected.values(), strict=True):
        torch.testing.assert_close(x, y)


def test_finer_levels_come_from_one_another_and_end_with_their_own_convolution():
    pyramid = FeaturePyramid((8, 16, 24), (16, 32, 64), channels=32, finest_stride=4)
    maps = make_maps((8, 16, 24), (16, 32, 64))
    merged = pyramid.laterals[2](maps[2])
    for i in (1, 0):
        above = torch.nn.functional.interpolate(merged, size=maps[i].shape[2:])
        merged = pyramid.laterals[i](maps[i]) + above
    eight = pyramid.finer_ups[0](merged)
    levels = pyramid(maps)
    assert list(levels) == ["4", "8", "16", "32", "64"]
    torch.testing.assert_close(levels["8"], pyramid.finer_smooths[0](eight))
    torch.testing.assert_close(levels["4"], pyramid.finer_smooths[1](pyramid.finer_ups[1](eight)))


def test_coarser_convolutions_begin_at_the_last_input_without_activation():
    pyramid = FeaturePyramid((8, 16), (16, 32), channels=32, coarser=2, coarser_by="conv")
    maps = make_maps((8, 16), (16, 32))
    levels = pyramid(maps)
    torch.testing.assert_close(levels["64"], pyramid.coarser_convs[0](maps[1]))
    torch.testing.assert_close(levels["128"], pyramid.coarser_convs[1](levels["64"]))


def test_map_of_one_pixel_has_coarser_levels():
    pyramid = FeaturePyramid((8,), (64,), channels=16, coarser=2, coarser_by="conv")
    assert [tuple(x.shape[2:]) for x in pyramid([torch.randn(1, 8, 1, 1)]).values()] == [(1, 1)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_strides": (16, 16)}, "strides that double, got \\(16, 16\\)"),
        ({"in_strides": (16, 32), "finest_stride": 5}, "finest_stride must be 16 or a half"),
        ({"in_strides": (16, 32), "finest_stride": 32}, "finest_stride must be 16 or a half"),
        ({"in_strides": (16, 32), "coarser_by": "mean"}, "coarser_by must be 'max_pool' or 'conv'"),
    ],
)
def test_impossible_pyramid_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        FeaturePyramid((8, 16), **arguments)
