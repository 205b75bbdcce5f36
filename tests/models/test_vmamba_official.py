"""VMamba's official argument names and checkpoint layouts, old and new."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.models.vmamba import VMamba, checkpoint_filter_fn, options_from_official
from support.reference import fill_checkpoint
from support.vmamba_layout import published_layout

CONFIG: dict[str, Any] = {
    "num_classes": 10,
    "depths": [1, 1],
    "dims": 16,
    "ssm_d_state": 2,
    "ssm_ratio": 2.0,
    "ssm_conv": 3,
    "ssm_conv_bias": True,
    "forward_type": "v0",
    "mlp_ratio": 4.0,
    "norm_layer": "ln",
    "downsample_version": "v1",
    "patchembed_version": "v1",
    "posembed": False,
    "imgsize": 224,
}


@pytest.fixture
def model() -> VMamba:
    return VMamba(**options_from_official(CONFIG))


@pytest.fixture
def published() -> dict[str, Tensor]:
    return fill_checkpoint(published_layout(CONFIG))


def assert_loads_as(model: nn.Module, other: dict[str, Tensor], published: dict[str, Tensor]) -> None:
    """Check that a state dict in another layout loads exactly like the published one."""
    expected, actual = checkpoint_filter_fn(published, model), checkpoint_filter_fn(other, model)
    model.load_state_dict(actual)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_names_of_january_2024_load(model: VMamba, published: dict[str, Tensor]) -> None:
    old_names = {
        "patch_embed.0": "patch_embed.proj",
        "patch_embed.2": "patch_embed.norm",
        ".0.norm.": ".0.ln_1.",
        ".op.": ".self_attention.",
        "classifier.": "",
    }
    old = {}
    for key, tensor in published.items():
        for new, name in old_names.items():
            key = key.replace(new, name)
        old[key] = tensor
    assert "norm.weight" in old
    assert "layers.0.blocks.0.self_attention.A_logs" in old
    assert_loads_as(model, old, published)


def test_pointwise_convolutions_load_as_linear_maps(model: VMamba, published: dict[str, Tensor]) -> None:
    leaves = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")
    convolutions = {
        key: tensor[:, :, None, None] if key.endswith(leaves) else tensor for key, tensor in published.items()
    }
    assert_loads_as(model, convolutions, published)


def test_dense_task_layout_loads_its_last_norm(model: VMamba, published: dict[str, Tensor]) -> None:
    dense = {key: tensor for key, tensor in published.items() if not key.startswith("classifier.")}
    dense |= {
        f"outnorm{i}.{leaf}": torch.full((16 * 2**i,), i + 5.0)
        for i in range(2)
        for leaf in ("weight", "bias")
    }
    mapped = checkpoint_filter_fn(dense, model)
    missing, unexpected = model.load_state_dict(mapped, strict=False)
    assert (missing, unexpected) == (["head.weight", "head.bias"], [])
    assert (model.norm.weight == 6).all()


def test_own_layout_stays_as_it_is(model: VMamba) -> None:
    ours = model.state_dict()
    mapped = checkpoint_filter_fn(ours, model)
    assert mapped.keys() == ours.keys()
    assert all(torch.equal(mapped[key], ours[key]) for key in ours)


def test_key_map_does_not_change_its_input(model: VMamba, published: dict[str, Tensor]) -> None:
    before = {key: tensor.clone() for key, tensor in published.items()}
    checkpoint_filter_fn(published, model)
    assert published.keys() == before.keys()
    assert all(torch.equal(published[key], before[key]) for key in before)


def test_checkpoint_with_a_gate_does_not_fit_a_model_without(published: dict[str, Tensor]) -> None:
    model = VMamba(**options_from_official(CONFIG) | {"gate": "none"})
    with pytest.raises(RuntimeError, match="gate_proj"):
        model.load_state_dict(checkpoint_filter_fn(published, model))


@pytest.mark.parametrize("img_size", [64, (48, 80)])
def test_position_table_of_another_size_is_resized(img_size: int | tuple[int, int]) -> None:
    config = CONFIG | {"posembed": True, "imgsize": 32}
    model = VMamba(**options_from_official(config) | {"img_size": img_size})
    weights = fill_checkpoint(published_layout(config))
    weights["pos_embed"] = torch.arange(16.0)[:, None, None].expand(1, 16, 8, 8)
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    torch.testing.assert_close(
        model.pos_embed.detach(), torch.arange(16.0)[None, :, None, None].expand_as(model.pos_embed)
    )


@pytest.mark.parametrize(
    ("forward_type", "expected"),
    [
        ("v0seq", {"gate": "silu", "ssm_conv_size": 3, "ssm_conv_bias": True}),
        ("v05_noz", {"gate": "none", "out_norm": "layer", "out_act": False, "scan_order": "cross2d"}),
        ("v05_noz_oact_no32", {"gate": "none", "out_act": True}),
        ("v02_nozact", {"gate": "linear"}),
        ("v05_oncnorm_noz", {"gate": "none", "out_norm": "layer_dwconv"}),
        ("v051d_onsigmoid_noz", {"out_norm": "sigmoid", "scan_order": "unidirectional"}),
        ("v052d", {"gate": "silu", "scan_order": "bidirectional"}),
    ],
)
def test_forward_type_becomes_typed_options(forward_type: str, expected: dict[str, Any]) -> None:
    options = options_from_official(CONFIG | {"forward_type": forward_type})
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"forward_type": "v9"}, "the first part of forward_type must be one of 'v0', .*, got 'v9'"),
        ({"forward_type": "v05_what"}, "a suffix of forward_type must be one of 'noz', .*, got 'what'"),
        ({"forward_type": "v0_noz"}, "'v0' takes no suffix, got 'v0_noz'"),
        ({"forward_type": "v052dc_noz"}, "the cascaded scan, which is not supported"),
        ({"gmlp": True}, "expected gmlp=False"),
        ({"norm_layer": "bn"}, "norm_layer must be one of 'ln', 'ln2d', got 'bn'"),
        ({"patch_size": 8}, "patch_size must be 4, got 8"),
        ({"depth": [2]}, "unknown arguments of the official VMamba: depth"),
    ],
)
def test_official_argument_that_is_not_offered_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        options_from_official(CONFIG | change)


def test_missing_official_argument_is_named() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "ssm_ratio"}
    with pytest.raises(UsageError, match="lacks ssm_ratio"):
        options_from_official(config)
