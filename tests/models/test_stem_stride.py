"""`stem_stride` for small images: same weights, larger feature maps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightspine
from lightspine.errors import UsageError
from lightspine.layers.arguments import stem_strides
from lightspine.models.factory import load_model
from lightspine.models.saving import save_checkpoint

# One model of each family, with options for images of 32 px.
SMALL: dict[str, dict[str, Any]] = {
    "vmamba_tiny": {"stem_stride": 2},
    "vim_tiny": {"stem_stride": 4, "img_size": 32},
    "efficientvim_m1": {"stem_stride": 4},
    "shvit_s1": {"stem_stride": 4},
    "efficientmod_xxs": {"stem_stride": 2},
}
PUBLISHED = {"vmamba_tiny": 4, "vim_tiny": 16, "efficientvim_m1": 16, "shvit_s1": 16, "efficientmod_xxs": 4}


@pytest.fixture(scope="module", params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lightspine.create_model(name, num_classes=10, **SMALL[name]).eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width)


def covered(model: nn.Module, side: int) -> int:
    """Return the pixels of a side that the stem covers; Vim's overlapping patches have no padding."""
    first = model.get_submodule(model.default_cfg["first_conv"])
    return side - max(0, first.kernel_size[0] - first.stride[0] - 2 * first.padding[0])


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96)], ids=str)
@torch.no_grad()
def test_maps_have_the_promised_reductions(model, size):
    maps = model.forward_intermediates(images(*size), intermediates_only=True)
    for found, info in zip(maps, model.feature_info, strict=True):
        for actual, side in zip(found.shape[2:], size, strict=True):
            # A partial patch at the border counts in every family but Vim.
            positions = covered(model, side) / info["reduction"]
            assert actual in (math.floor(positions), math.ceil(positions))


@torch.no_grad()
def test_last_map_of_a_small_image_is_more_than_a_pixel(name, model):
    published = lightspine.create_model(name).eval()
    last = [m.forward_intermediates(images(), intermediates_only=True)[-1] for m in (published, model)]
    assert last[0].shape[2:].numel() in (1, 4)  # of Vim 2 x 2 patches
    assert last[1].shape[2:].numel() >= 4 * last[0].shape[2:].numel()


@torch.no_grad()
def test_published_weights_load(name, tmp_path):
    source = lightspine.create_model(name)
    torch.save({"model": source.state_dict()}, tmp_path / "published.pth")
    model = lightspine.create_model(name, checkpoint=tmp_path / "published.pth", **SMALL[name])
    assert not model.load_report.dropped
    changed = {
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, source.state_dict()[key])
    }
    assert changed == ({"pos_embed"} if name == "vim_tiny" else set())


@torch.no_grad()
def test_published_stride_is_the_default(name):
    torch.manual_seed(0)
    default = lightspine.create_model(name).eval()
    torch.manual_seed(0)
    explicit = lightspine.create_model(name, stem_stride=PUBLISHED[name]).eval()
    x = images()
    assert torch.equal(default(x), explicit(x))
    assert default.feature_info == explicit.feature_info


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit:FutureWarning", r"ignore:.*torch\.jit:DeprecationWarning")
@torch.no_grad()
def test_scripted_model_gives_the_same(model):
    x = images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@torch.no_grad()
def test_saved_model_comes_back_with_its_stride(name, model, tmp_path):
    save_checkpoint(model, tmp_path / "model.safetensors")
    again, saved = load_model(tmp_path / "model.safetensors")
    x = images()
    assert torch.equal(again(x), model(x))
    assert saved.kwargs["stem_stride"] == SMALL[name]["stem_stride"]


def test_every_parameter_receives_a_gradient(name):
    model = lightspine.create_model(name, num_classes=10, **SMALL[name]).train()
    model(images()).square().mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_features_only_knows_the_stride(name):
    wrapped = lightspine.create_model(name, features_only=True, **SMALL[name])
    assert wrapped.feature_info.reduction()[0] == SMALL[name]["stem_stride"]


@pytest.mark.parametrize("stride", [0, 3, 32])
@pytest.mark.parametrize("name", ["efficientvim_m1", "shvit_s1", "efficientmod_xxs", "vmamba_tiny"])
def test_impossible_stride_is_refused(name, stride):
    with pytest.raises(UsageError, match=rf"stem_stride must be 1, .* got {stride}"):
        lightspine.create_model(name, stem_stride=stride)


def test_vmamba_of_the_first_release_has_its_one_stride():
    with pytest.raises(UsageError, match="'v1' has stem_stride=4 only, got 2"):
        lightspine.create_model("vmamba_tiny_v0", stem_stride=2)


@torch.no_grad()
def test_position_table_of_vmamba_fits_the_stride():
    model = lightspine.create_model(
        "vmamba_tiny", depths=(1, 1, 1, 1), pos_embed=True, img_size=32, stem_stride=2
    )
    assert model.pos_embed.shape[2:] == (16, 16)
    assert model.eval()(images()).isfinite().all()


def test_vim_takes_its_stride_by_one_name_only():
    with pytest.raises(UsageError, match="received both, 8 and 4"):
        lightspine.create_model("vim_tiny", stride=8, stem_stride=4)


@pytest.mark.parametrize("option", ["stride", "stem_stride"])
def test_vim_refuses_a_stride_below_one(option):
    with pytest.raises(UsageError, match="at least 1: received 0"):
        lightspine.create_model("vim_tiny", depth=2, **{option: 0})


def test_stem_stride_goes_before_the_stride_of_a_vim_variant():
    assert lightspine.create_model("vim_tiny_plus", depth=4, stem_stride=4).stride == 4


@pytest.mark.parametrize(
    ("stride", "strides"), [(1, (1, 1, 1, 1)), (4, (1, 1, 2, 2)), (8, (1, 2, 2, 2)), (16, (2, 2, 2, 2))]
)
def test_first_convolutions_lose_their_stride(stride, strides):
    assert stem_strides(stride, 4) == strides
