"""VMamba's SS2D and VSS block in isolation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.models.vmamba import SS2D, VMamba, VSSBlock, convert_ss2d, options_from_official
from support.reference import assert_close, fill_checkpoint, read_figure

FIGURES = {
    name: figure
    for name, figure in read_figure("vmamba/blocks")["ss2d"].items()
    if "v052dc" not in name  # the cascaded scan is not supported
}


def build_ss2d(arguments: dict[str, Any]) -> nn.Module:
    """Return the SS2D of a VMamba with the arguments of the official SS2D."""
    config = {
        "dims": 32,
        "depths": [1],
        "ssm_d_state": arguments["d_state"],
        "ssm_ratio": arguments["ssm_ratio"],
        "ssm_conv": arguments.get("d_conv", 3),
        "ssm_conv_bias": arguments.get("conv_bias", True),
        "ssm_act_layer": arguments.get("act_layer", "SiLU").lower(),
        "forward_type": arguments["forward_type"],
        "mlp_ratio": 0.0,
        "downsample_version": "v3",
        "patchembed_version": "v2",
    }
    return VMamba(**options_from_official(config)).stages[0].blocks[0].ssm


def sampled(tensor: Tensor, figure: dict[str, Any]) -> Tensor:
    return tensor.flatten()[:: figure["stride"]][:48]


@pytest.mark.parametrize("name", FIGURES)
def test_ss2d_output_and_gradients_match_the_figure(name: str) -> None:
    figure = FIGURES[name]
    module = build_ss2d(figure["arguments"])
    module.load_state_dict(convert_ss2d(fill_checkpoint(figure["keys"])))
    module.double()
    x = torch.from_numpy(np.random.RandomState(21).standard_normal((2, 32, 5, 7))).requires_grad_()
    weight = torch.from_numpy(np.random.RandomState(22).standard_normal((2, 32, 5, 7)))
    out = module(x)
    (out * weight).sum().backward()
    assert_close("out", sampled(out, figure["out"]), figure["out"]["values"], 1e-8)
    assert_close("norm of out", out.norm()[None], [figure["out"]["l2"]], 1e-8)
    assert_close(
        "input gradient", sampled(x.grad, figure["grad_input"]), figure["grad_input"]["values"], 1e-8
    )
    norms = published_gradient_norms(module)
    assert norms.keys() == figure["grad_l2"].keys()
    for key, expected in figure["grad_l2"].items():
        assert_close(f"gradient of {key}", norms[key][None], [expected], 1e-7)


def published_gradient_norms(module: nn.Module) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    if "gate_proj.weight" in gradients:
        gradients["in_proj.weight"] = torch.cat(
            [gradients["in_proj.weight"], gradients.pop("gate_proj.weight")]
        )
    if "out_norm.1.weight" in gradients:
        gradients["out_norm.2.weight"] = gradients.pop("out_norm.1.weight")
    elif isinstance(module.out_norm, nn.Conv2d):
        gradients["out_norm.1.weight"] = gradients.pop("out_norm.weight")
    published = {
        "A_log": "A_logs",
        "D": "Ds",
        "dt_weight": "dt_projs_weight",
        "dt_bias": "dt_projs_bias",
        "x_proj.weight": "x_proj_weight",
        "conv.weight": "conv2d.weight",
        "conv.bias": "conv2d.bias",
    }
    return {published.get(name, name): gradient.norm() for name, gradient in gradients.items()}


def test_ss2d_keeps_the_transpose_of_a_map_when_directions_are_alike() -> None:
    # With equal weights in all four directions, rows and columns are interchangeable.
    module = SS2D(8, state_dim=2, conv_size=0, out_norm="none")
    with torch.no_grad():
        for parameter in (module.dt_weight, module.dt_bias, module.A_log):
            parameter.copy_(parameter[:1].expand_as(parameter))
        rows = module.x_proj.weight.view(4, -1, 16)
        rows.copy_(rows[:1].expand_as(rows))
        x = torch.randn(1, 8, 4, 6)
        torch.testing.assert_close(module(x.mT).mT, module(x))


def test_blocks_take_any_memory_layout() -> None:
    block = VSSBlock(16)
    x = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x))


def test_block_without_mlp_has_no_parameters_for_it() -> None:
    names = {name.split(".")[0] for name, _ in VSSBlock(16, mlp_ratio=0).named_parameters()}
    assert names == {"norm1", "ssm"}


@torch.no_grad()
def test_state_space_parameters_start_as_in_mamba() -> None:
    module = SS2D(64, state_dim=16)
    steps = F.softplus(module.dt_bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 1.01e-1
    # Log-uniform: the logarithm's mean is the middle of its range.
    assert steps.log().mean() == pytest.approx(math.log(1e-2), abs=0.25)
    torch.testing.assert_close(module.A_log.exp(), torch.arange(1.0, 17).expand(4, 128, 16))
    assert (module.D == 1).all()
    assert module.dt_weight.abs().max() <= 4**-0.5
    assert module.dt_weight.std() == pytest.approx(4**-0.5 / math.sqrt(3), rel=0.1)


@torch.no_grad()
def test_linear_maps_start_with_the_published_deviation() -> None:
    block = VSSBlock(96, gate="silu")
    linears = (block.ssm.in_proj, block.ssm.gate_proj, block.ssm.out_proj, block.mlp.fc1, block.mlp.fc2)
    for linear in linears:
        assert linear.weight.std() == pytest.approx(0.02, rel=0.05)
        assert linear.bias is None or not linear.bias.any()
    bound = 96**-0.5
    assert bound * 0.99 < block.ssm.x_proj.weight.abs().max() <= bound


@torch.no_grad()
def test_init_v1_is_normal() -> None:
    module = SS2D(96, state_dim=4, init="v1")
    assert module.A_log.std() == pytest.approx(1, rel=0.1)
    assert module.dt_bias.std() == pytest.approx(0.1, rel=0.1)
    assert module.dt_weight.std() == pytest.approx(0.1, rel=0.1)
    assert module.dt_weight.mean().abs() < 0.01


@torch.no_grad()
def test_init_v2_is_uniform_with_constant_decay() -> None:
    module = SS2D(96, state_dim=4, init="v2")
    assert not module.A_log.any()
    for parameter in (module.dt_bias, module.dt_weight):
        assert 0 <= parameter.min() < 0.005
        assert 0.095 < parameter.max() <= 0.1


def test_ss2d_under_autocast_stays_close_to_float32() -> None:
    module, x = SS2D(32, state_dim=4, gate="silu"), torch.randn(1, 32, 6, 5)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x)
    assert actual.dtype == torch.bfloat16
    assert_close("out", actual, expected, 2e-2)


def test_ss2d_cast_to_bfloat16_runs() -> None:
    module = SS2D(32, gate="silu", out_norm="layer_dwconv").bfloat16()
    assert module(torch.randn(1, 32, 6, 5, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"act": "elu"}, "act must be one of 'silu', 'gelu', 'relu', 'sigmoid', got 'elu'"),
        ({"gate": "gelu"}, "gate must be one of 'silu', 'linear', 'none', got 'gelu'"),
        ({"out_norm": "batch"}, "out_norm must be one of 'layer', 'none', 'dwconv', .*, got 'batch'"),
        ({"init": "v3"}, "init must be one of 'v0', 'v1', 'v2', got 'v3'"),
        ({"conv_size": 4}, "conv_size must be 0 or an odd number from 3 up, got 4"),
        ({"dt_rank": "full"}, "dt_rank must be a number or 'auto', got 'full'"),
        ({"scan_order": "spiral"}, "unknown scan order 'spiral'"),
        ({"scan_order": "cascade2d"}, "'cascade2d' is not supported"),
    ],
)
def test_wrong_option_of_ss2d_is_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        SS2D(32, **options)
