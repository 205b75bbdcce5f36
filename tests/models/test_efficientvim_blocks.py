"""EfficientViM blocks: mixers against explicit sums, symmetries and complexity."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightspine.errors import UsageError
from lightspine.models.efficientvim import HSMSSD, NCSSD, ChannelNorm, EfficientViMBlock

MIXERS = {"hsm-ssd": HSMSSD, "nc-ssd": NCSSD}
both_mixers = pytest.mark.parametrize("mixer_cls", MIXERS.values(), ids=MIXERS)


def make_mixer(mixer_cls: type, local: bool = True, **options) -> nn.Module:
    """Return a float64 mixer; without `local` its depthwise convolution has only a center weight."""
    mixer = mixer_cls(12, state_dim=5, **options).double()
    with torch.no_grad():
        mixer.D.fill_(0.7)
        if not local:
            mixer.dwconv.weight.zero_()[:, :, 1, 1] = 1.0
    return mixer


def per_position(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (B, C, L) and the published B, C and dt, each (B, N, L), computed naively."""
    maps = F.conv2d(F.conv2d(x, mixer.bcdt_proj.weight), mixer.dwconv.weight, padding=1, groups=15)
    return x.flatten(2), *maps.flatten(2).split(5, dim=1)


@torch.no_grad()
def test_hsm_ssd_is_its_written_out_sum():
    mixer, x = make_mixer(HSMSSD, expand=1.5), torch.randn(2, 12, 4, 7, dtype=torch.float64)
    u, b, c, dt = per_position(mixer, x)
    weight = torch.exp(dt + mixer.A[:, None])
    weight = weight / weight.sum(-1, keepdim=True)
    h = torch.einsum("bcl,bnl,bnl->bcn", u, weight, b)
    h, z = torch.einsum("oc,bcn->bon", mixer.hz_proj.weight, h).split(18, dim=1)
    h = torch.einsum("oc,bcn->bon", mixer.out_proj.weight, h * z * torch.sigmoid(z) + h * mixer.D)
    y, state = mixer.forward_with_state(x)
    torch.testing.assert_close(state, h)
    torch.testing.assert_close(y.flatten(2), torch.einsum("bcn,bnl->bcl", h, c))


@torch.no_grad()
def test_nc_ssd_is_its_written_out_sum():
    mixer, x = make_mixer(NCSSD, expand=1.5), torch.randn(2, 12, 4, 7, dtype=torch.float64)
    tokens, b, c, dt = per_position(mixer, x)
    weight = torch.exp(dt + mixer.A[:, None])
    weight = weight / weight.sum(-1, keepdim=True)
    u, z = torch.einsum("oc,bcl->bol", mixer.uz_proj.weight, tokens).split(18, dim=1)
    h = torch.einsum("bcl,bnl,bnl->bcn", u, weight, b)
    y = (torch.einsum("bcn,bnl->bcl", h, c) + mixer.D * u) * z * torch.sigmoid(z)
    mixed, state = mixer.forward_with_state(x)
    torch.testing.assert_close(state, h)
    torch.testing.assert_close(mixed.flatten(2), torch.einsum("oc,bcl->bol", mixer.out_proj.weight, y))


@both_mixers
@torch.no_grad()
def test_without_the_depthwise_convolution_positions_may_be_permuted(mixer_cls):
    mixer, x = make_mixer(mixer_cls, local=False), torch.randn(2, 12, 4, 6, dtype=torch.float64)
    order = torch.randperm(24)
    y, state = mixer.forward_with_state(x)
    permuted = x.flatten(2)[:, :, order].unflatten(2, (3, 8))
    y_permuted, state_permuted = mixer.forward_with_state(permuted)
    torch.testing.assert_close(y_permuted.flatten(2), y.flatten(2)[:, :, order])
    torch.testing.assert_close(state_permuted, state)


@both_mixers
@torch.no_grad()
def test_repeating_the_image_keeps_the_hidden_state(mixer_cls):
    mixer, x = make_mixer(mixer_cls, local=False), torch.randn(1, 12, 4, 6, dtype=torch.float64)
    state = mixer.forward_with_state(x)[1]
    torch.testing.assert_close(mixer.forward_with_state(torch.cat([x, x], dim=3))[1], state)


@both_mixers
@torch.no_grad()
def test_token_importance_offset_has_no_effect(mixer_cls):
    mixer, x = make_mixer(mixer_cls), torch.randn(1, 12, 4, 6, dtype=torch.float64)
    expected = mixer(x)
    mixer.A.zero_()
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize(("mixer_cls", "positions"), [(HSMSSD, 5), (NCSSD, 16 * 9)], ids=MIXERS)
def test_channel_mixing_costs_as_much_as_what_it_runs_over(mixer_cls, positions):
    mixer, x = mixer_cls(12, state_dim=5), torch.randn(1, 12, 16, 9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(x)
    length = 16 * 9
    shared = (12 * 15 + 15 * 9 + 2 * 12 * 5) * length  # B C dt, depthwise, write and read
    assert counter.get_total_flops() == 2 * (shared + 3 * 12 * 12 * positions)


@both_mixers
@torch.no_grad()
def test_memory_layout_does_not_change_the_result(mixer_cls):
    mixer, x = make_mixer(mixer_cls), torch.randn(2, 12, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(mixer(x.contiguous(memory_format=torch.channels_last)), mixer(x))


@pytest.mark.parametrize("axes", [1, 2], ids=["BCL", "BCHW"])
def test_channel_norm_normalises_over_channels(axes):
    norm, x = ChannelNorm(12, axes).double(), torch.randn(2, 12, *(5, 7)[:axes], dtype=torch.float64)
    y = norm(3 * x + 2)
    torch.testing.assert_close(y.mean(1), torch.zeros_like(y[:, 0]))
    assert norm.weight.ndim == y.ndim
    torch.testing.assert_close(y.var(1, correction=0), torch.ones_like(y[:, 0]), rtol=1e-4, atol=0)


def make_block(**options) -> EfficientViMBlock:
    return EfficientViMBlock(12, state_dim=5, **options).double()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 15)], ids=["1x1", "3x2", "7x15"])
@torch.no_grad()
def test_block_keeps_any_map_size(mixer, size):
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    assert make_block(mixer=mixer).eval()(x).shape == x.shape


@torch.no_grad()
def test_closed_gates_make_the_block_the_identity():
    block, x = make_block().eval(), torch.randn(2, 12, 4, 7, dtype=torch.float64)
    block.alpha.fill_(-100.0)
    torch.testing.assert_close(block(x), x)


@torch.no_grad()
def test_open_gates_leave_the_branches_alone():
    block, x = make_block().eval(), torch.randn(2, 12, 4, 7, dtype=torch.float64)
    block.alpha.fill_(100.0)
    # Inside a block the mixer returns its state, too.
    mixed, _ = block.mixer(block.norm(block.dwconv1(x)))
    expected = block.ffn(block.dwconv2(mixed))
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_drop_path_of_one_skips_every_branch_in_training_only():
    block, x = make_block(drop_path=1.0), torch.randn(2, 12, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(block.train()(x), x)
    assert not torch.allclose(block.eval()(x), x)


def test_drop_path_keeps_the_mean_of_a_branch():
    block, x = make_block(drop_path=0.5), torch.randn(1, 12, 2, 2, dtype=torch.float64)
    batch = x.expand(4000, -1, -1, -1)
    gate = torch.tensor(0.25, dtype=torch.float64)
    blended = block.train()._blend(batch, batch + 1, gate)
    torch.testing.assert_close(blended.mean(0), x[0] + 0.25, rtol=0, atol=0.02)


@torch.no_grad()
def test_gates_blend_in_full_precision_under_autocast():
    block, x = EfficientViMBlock(12, state_dim=5).eval(), torch.randn(2, 12, 4, 7)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{"mixer": "ssm"}, {"state_dim": 0}, {"expand": 0.0}], ids=str)
def test_wrong_argument_of_a_block_is_an_error(options):
    with pytest.raises(UsageError):
        EfficientViMBlock(12, **options)
