"""Vim's mixer and block in isolation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.models.vim import Vim, VimBlock, VimLayerPair, VimMixer, checkpoint_filter_fn
from support.reference import assert_close, fill_checkpoint, read_figure

MIXERS = {
    "v2_div2": {},
    "v2": {"divide_out": False},
    "v1": {"directions": "v1"},
    "none": {"directions": "one-way"},
    "none_slow_path": {"directions": "one-way"},
    "v2_div2_layer_scale": {"layer_scale": 0.1},
}


def load_mixer(figure: dict[str, Any], **options: Any) -> tuple[VimMixer, dict[str, str]]:
    """Return the reference mixer and the mapping from official keys to ours."""
    published = {f"layers.0.mixer.{key}": key for key in figure["keys"]}
    renamed = checkpoint_filter_fn({key: key for key in published}, Vim(dim=32, depth=1, pos_embed=False))
    ours = {published[old]: new.removeprefix("blocks.0.mixer.") for new, old in renamed.items()}
    mixer = VimMixer(32, **options)
    mixer.load_state_dict({ours[key]: value for key, value in fill_checkpoint(figure["keys"]).items()})
    return mixer.double(), ours


def tokens(seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 35, 32)))


def sample(x: Tensor, figure: dict[str, Any]) -> Tensor:
    return x.flatten()[:: figure["stride"]][:48]


@pytest.fixture(params=MIXERS)
def figure_mixer(request: pytest.FixtureRequest) -> tuple[dict[str, Any], VimMixer, dict[str, str]]:
    figure = read_figure("vmamba/blocks")["vim_mixer"][request.param]
    return figure, *load_mixer(figure, **MIXERS[request.param])


def test_mixer_output_equals_official(figure_mixer: Any) -> None:
    figure, mixer, _ = figure_mixer
    out = mixer.forward_tokens(tokens(21))
    assert_close("out", sample(out, figure["out"]), figure["out"]["values"], 1e-10)
    assert_close("out (norm)", out.norm(), figure["out"]["l2"], 1e-10)


def test_mixer_gradients_equal_official(figure_mixer: Any) -> None:
    figure, mixer, ours = figure_mixer
    x = tokens(21).requires_grad_()
    (mixer.forward_tokens(x) * tokens(22)).sum().backward()
    assert x.grad is not None
    assert_close("grad_input", sample(x.grad, figure["grad_input"]), figure["grad_input"]["values"], 1e-10)
    parameters = dict(mixer.named_parameters())
    for key, norm in figure["grad_l2"].items():
        grad = parameters[ours[key]].grad
        assert grad is not None, key
        assert_close(key, grad.norm(), norm, 1e-8)


@pytest.mark.parametrize("directions", ["v2", "v1", "one-way"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (7, 5)])
def test_mixer_reads_a_map_as_its_rows(directions: str, height: int, width: int) -> None:
    mixer = VimMixer(16, directions=directions)
    x = torch.randn(2, 16, height, width)
    expected = mixer.forward_tokens(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(mixer(x).flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize("conv_kernel", [1, 2, 4])
def test_reverse_mixer_equals_flipping_the_sequence(conv_kernel: int) -> None:
    ahead = VimMixer(16, directions="one-way", conv_kernel=conv_kernel, layout="NLC").double()
    back = VimMixer(16, directions="one-way", conv_kernel=conv_kernel, layout="NLC", reverse=True).double()
    back.load_state_dict(ahead.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(back(x), ahead(x.flip(1)).flip(1))


def test_one_way_mixer_is_causal() -> None:
    mixer = VimMixer(16, directions="one-way", layout="NLC").double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7:] += 1
    before, after = mixer(x)[:, :7], mixer(changed)[:, :7]
    torch.testing.assert_close(before, after)


def test_mixer_honours_its_sizes() -> None:
    mixer = VimMixer(16, state_dim=3, expand=4, conv_kernel=5, dt_rank=2)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes["back.A_log"] == (64, 3)
    assert shapes["ahead.conv1d.weight"] == (64, 1, 5)
    assert shapes["ahead.x_proj.weight"] == (2 + 2 * 3, 64)
    assert mixer(torch.randn(1, 16, 4, 3)).shape == (1, 16, 4, 3)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_block_adds_its_mixer_to_the_stream(norm: str) -> None:
    block = VimBlock(16, norm=norm)
    x = torch.randn(2, 16, 3, 5)
    normed = block.norm(x.permute(0, 2, 3, 1)).flatten(1, 2)
    mixed = block.mixer(normed).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), x + mixed)


def test_layer_pair_equals_two_layers_and_a_flip() -> None:
    pair = VimLayerPair(16, layout="NLC").double()
    second = VimBlock(16, directions="one-way", layout="NLC").double()
    second.load_state_dict(pair.back.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(pair(x), pair.ahead(x) + second(x.flip(1)).flip(1))


def test_dropped_block_passes_the_stream_through() -> None:
    block = VimBlock(16, drop_path=0.999999).train()
    x = torch.randn(2, 16, 3, 5)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("directions", ["v2", "v1", "one-way"])
def test_half_precision_weights_keep_a_float32_stream(directions: str) -> None:
    block = VimBlock(32, directions=directions)
    x = torch.randn(1, 32, 6, 6)
    out = VimBlock.bfloat16(block.eval())(x)
    assert out.dtype == torch.float32
    assert_close("bfloat16 block", out, block.float()(x).detach().tolist(), 2e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("options", [*MIXERS.values(), {"norm": "layer"}], ids=str)
def test_block_scripts_to_the_same_numbers(options: dict[str, Any]) -> None:
    block: nn.Module = VimBlock(16, **options).eval()
    x = torch.randn(1, 16, 3, 5)
    # A script calls the convolution as a layer, in another memory layout.
    torch.testing.assert_close(torch.jit.script(block)(x), block(x), rtol=1e-5, atol=1e-6)


def test_steps_start_as_published() -> None:
    mixer = VimMixer(64)
    steps = torch.nn.functional.softplus(mixer.ahead.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.002
    assert 0.05 < steps.max() <= 0.1 + 1e-6
    # The backward bias starts at 0, not in that range: a quirk of the published initialisation.
    assert not mixer.back.dt_proj.bias.any()
    assert mixer.back.dt_proj.weight.abs().max() <= 1 / math.sqrt(4)
    torch.testing.assert_close(-mixer.back.A_log.exp()[5], -torch.arange(1.0, 17.0))


@pytest.mark.parametrize(
    ("build", "options", "sentence"),
    [
        (VimMixer, {"directions": "v3"}, "directions must be one of 'v2', 'v1', 'one-way', got 'v3'"),
        (VimMixer, {"layout": "NHWC"}, "layout must be one of 'NCHW', 'NLC', got 'NHWC'"),
        (VimMixer, {"directions": "v1", "divide_out": True}, "divide_out belongs to directions 'v2'"),
        (VimMixer, {"reverse": True}, "reverse belongs to directions 'one-way': received it with 'v2'"),
        (VimBlock, {"norm": "batch"}, "norm must be one of 'rms', 'layer', got 'batch'"),
    ],
)
def test_wrong_options_are_named(build: type[nn.Module], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        build(16, **options)
