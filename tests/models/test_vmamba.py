"""VMamba against reference values of the official code, and its options."""

from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightspine
from lightspine.errors import UsageError
from lightspine.models.vmamba import VMamba, checkpoint_filter_fn, options_from_official
from support.reference import assert_close, figure_images, fill_checkpoint, load_figure_model, read_figure
from support.vmamba_layout import published_layout

VARIANTS = [
    pytest.param("vmamba_tiny", "vmambav2v_tiny"),
    pytest.param("vmamba_tiny_v0", "vmambav0_tiny", marks=pytest.mark.slow),
    pytest.param("vmamba_tiny_s2l5", "vmambav2_tiny", marks=pytest.mark.slow),
    pytest.param("vmamba_small_v0", "vmambav0_small", marks=pytest.mark.slow),
    pytest.param("vmamba_small_s1l20", "vmambav2v_small", marks=pytest.mark.slow),
    pytest.param("vmamba_base", "vmambav2_base", marks=pytest.mark.slow),
    pytest.param("vmamba_base_s1l20", "vmambav2v_base", marks=pytest.mark.slow),
]
ABLATIONS = read_figure("vmamba/ablations_vmamba")["cases"]
FAST_ABLATIONS = ("a7a", "bidi_ndw", "onsoftmax", "posndw")
SMALL: dict[str, Any] = {"embed_dims": (16, 32), "depths": (1, 2), "num_classes": 10}


@pytest.mark.parametrize(("name", "figure_name"), VARIANTS)
def test_logits_and_features_in_float64(name: str, figure_name: str, tmp_path: Path) -> None:
    figure = read_figure(f"vmamba/{figure_name}")
    model = load_figure_model(name, figure, tmp_path).double()
    with torch.no_grad():
        last, maps = model.forward_intermediates(figure_images(figure))
        logits = model.forward_head(last)
    assert_close("logits", logits, figure["logits"], 1e-7)
    for i, stage_map in enumerate(maps):
        expected = figure["features"][f"stage{i}"]
        values = stage_map[0].flatten()
        assert list(stage_map.shape[1:]) == expected["shape"]
        assert_equals_printed(f"stage {i}", values[:: len(values) // 8][:8], expected["values"])
        assert_close(f"stage {i}, deviation", values.std(correction=0)[None], [expected["std"]], 1e-7)


def assert_equals_printed(name: str, actual: Tensor, expected: list[float]) -> None:
    """Compare with numbers of 8 digits, allowing for their rounding and a relative difference of 1e-9."""
    printed = torch.tensor(expected, dtype=torch.float64)
    rounding = 0.5 * 10 ** (printed.abs().log10().floor() - 7)
    excess = (actual - printed).abs() - rounding
    assert (excess <= 1e-9 * printed.norm()).all(), f"{name}: {actual.tolist()} against {expected}"


@pytest.mark.parametrize(("name", "figure_name"), VARIANTS)
def test_logits_in_float32(name: str, figure_name: str, tmp_path: Path) -> None:
    figure = read_figure(f"vmamba/{figure_name}")
    model = load_figure_model(name, figure, tmp_path)
    with torch.no_grad():
        logits = model(figure_images(figure, torch.float32))
    assert_close("logits", logits, figure["logits"], 2e-5)


@pytest.mark.parametrize(
    ("name", "figure_name"),
    [
        pytest.param("vmamba_tiny", "vmambav2v_tiny"),
        pytest.param("vmamba_tiny_v0", "vmambav0_tiny", marks=pytest.mark.slow),
    ],
)
def test_training_gradients_in_float64(name: str, figure_name: str, tmp_path: Path) -> None:
    figure = read_figure(f"vmamba/{figure_name}")
    training = figure["training"]
    model = load_figure_model(name, figure, tmp_path).double().train()
    logits = model(figure_images(training))
    loss = F.cross_entropy(logits, torch.tensor([0, 1]))
    loss.backward()
    assert_close("loss", loss[None], [training["loss"]], 1e-10)
    assert_close("logits", logits[:, :8], training["logits_first8"], 1e-8)
    gradients = published_gradients(model, figure["checkpoint"])
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_close("total", total[None], [training["total_gradient_l2"]], 1e-8)
    for key, expected in training["gradients"].items():
        gradient = gradients[key].flatten()
        assert_close(f"norm of {key}", gradient.norm()[None], [expected["l2"]], 1e-7)
        assert_close(f"start of {key}", gradient[:4], expected["first4"], 1e-6)


def published_gradients(model: nn.Module, layout: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the gradients by published key, inverting the key map.

    The map is applied to the running number of each published element; that tells where each of our elements
    comes from.
    """
    sizes = {key: torch.Size(shape).numel() for key, shape in layout.items()}
    numbers = torch.arange(sum(sizes.values())).split(list(sizes.values()))
    origin = checkpoint_filter_fn(
        {key: part.view(layout[key]) for key, part in zip(layout, numbers, strict=True)}, model
    )
    flat = torch.full((sum(sizes.values()),), float("nan"), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        flat[origin[name]] = parameter.grad
    assert not flat.isnan().any()
    parts = flat.split(list(sizes.values()))
    return {key: part.view(layout[key]) for key, part in zip(layout, parts, strict=True)}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[] if name.split("224_")[1] in FAST_ABLATIONS else pytest.mark.slow)
        for name in ABLATIONS
        if "cas2d" not in name
    ],
)
def test_ablation_in_float64(case: str) -> None:
    expected = ABLATIONS[case]
    config = expected["variant"]
    layout = published_layout(config)
    assert len(layout) == expected["keys_checksum"]["count"]
    model = lightspine.create_model(
        "vmamba_tiny", checkpoint=fill_checkpoint(layout), **options_from_official(config)
    )
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    images = figure_images({"input": {"batch": 2, "height": 64, "width": 64, "seed": 0}})
    with torch.no_grad():
        logits = model.eval().double()(images)
    assert_close("logits", logits[:, ::20], expected["logits_every_20th"], 1e-7)


@pytest.mark.parametrize("case", [name for name in ABLATIONS if "cas2d" in name])
def test_ablation_with_cascaded_scan_is_refused(case: str) -> None:
    with pytest.raises(UsageError, match="cascaded scan, which is not supported"):
        options_from_official(ABLATIONS[case]["variant"])


@pytest.mark.parametrize(("height", "width"), [(97, 161), (225, 250), (33, 47)])
@pytest.mark.parametrize("downsample", ["v1", "v3"])
def test_odd_sizes_round_up_after_the_stem(height: int, width: int, downsample: str) -> None:
    model = VMamba(
        **SMALL | {"embed_dims": (8, 16, 32), "depths": (1, 1, 1)}, stem="v1", downsample=downsample
    )
    with torch.no_grad():
        _, maps = model.eval().forward_intermediates(torch.randn(1, 3, height, width))
    sides = (height // 4, width // 4)
    for stage_map in maps:
        assert tuple(stage_map.shape[2:]) == sides
        sides = (-(-sides[0] // 2), -(-sides[1] // 2))


def test_patch_merging_pads_odd_maps_with_zeros() -> None:
    merge = VMamba(**SMALL, downsample="v1").stages[1].downsample
    x = torch.randn(2, 16, 5, 7)
    torch.testing.assert_close(merge(x), merge(F.pad(x, (0, 1, 0, 1))))


def test_maps_keep_channels_innermost() -> None:
    _, maps = VMamba(**SMALL).forward_intermediates(torch.randn(2, 3, 32, 40))
    assert all(stage_map.is_contiguous(memory_format=torch.channels_last) for stage_map in maps)


def test_position_table_is_resized_to_the_map() -> None:
    model = VMamba(**SMALL, pos_embed=True, img_size=(32, 48)).eval()
    with torch.no_grad():
        model.pos_embed.copy_(torch.arange(16.0)[:, None, None])
        added = model.pos_embed[:, :, :1, :1]
        plain = model.stem(torch.zeros(1, 3, 57, 70)) + added
        expected = model.stages(plain)
        _, maps = model.forward_intermediates(torch.zeros(1, 3, 57, 70))
    torch.testing.assert_close(maps[-1], expected)


def test_model_with_a_position_table_traces() -> None:
    model = VMamba(**SMALL, pos_embed=True, img_size=64, out_norm="softmax", downsample="v1").eval()
    traced = torch.fx.symbolic_trace(model)
    for size in (64, 75):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_tiny_v0"])
def test_weight_decay_groups_are_the_published_ones(name: str) -> None:
    figure = read_figure(
        "vmamba/" + {"vmamba_tiny": "vmambav2v_tiny", "vmamba_tiny_v0": "vmambav0_tiny"}[name]
    )
    model = lightspine.create_model(name)
    spared = {
        key: len(shape) == 1 or key.endswith(".bias") or key == "pos_embed"
        for key, shape in figure["checkpoint"].items()
    }
    marks = {key: torch.full(shape, spared[key]) for key, shape in figure["checkpoint"].items()}
    expected = {name for name, mark in checkpoint_filter_fn(marks, model).items() if mark.all()}
    groups = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    actual = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert actual == expected


def test_position_table_is_not_decayed() -> None:
    assert VMamba(**SMALL, pos_embed=True).no_weight_decay() == {"pos_embed"}


def test_stochastic_depth_grows_linearly_over_all_blocks() -> None:
    model = VMamba(**SMALL | {"depths": (2, 3)}, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_new_classifier_follows_the_precision_of_the_model() -> None:
    model = VMamba(**SMALL).double()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stem": "v3"}, "stem must be one of 'v1', 'v2', got 'v3'"),
        ({"downsample": "v4"}, "downsample must be one of 'v1', 'v2', 'v3', got 'v4'"),
        ({"embed_dims": (16,)}, "one entry per stage, got 1 and 2"),
        ({"embed_dims": (15, 30)}, "the stem 'v2' needs an even number of channels, got 15"),
        ({"mlp_act": "tanh"}, "mlp_act must be one of 'silu', 'gelu', 'relu', 'sigmoid', got 'tanh'"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or '', got 'max'"),
        ({"global_pool": ""}, "a classifier needs global_pool='avg', got '' with num_classes=10"),
    ],
)
def test_wrong_option_is_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        VMamba(**SMALL | options)
