"""EfficientViM against reference values of the official code and timm's model."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine.models import get_record
from support.reference import (
    assert_close,
    figure_images,
    fill_checkpoint,
    load_figure_model,
    read_figure,
    write_official_file,
)

slow = pytest.mark.slow
FIGURES = [
    "M1",
    "M1_dist",
    pytest.param("M2", marks=slow),
    pytest.param("M2_dist", marks=slow),
    pytest.param("M4", marks=slow),
    pytest.param("M4_dist", marks=slow),
]


def load(figure_name: str, folder: Any, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    figure = read_figure(f"efficientvim/EfficientViM_{figure_name}")
    return load_figure_model(f"efficientvim_{figure_name.lower()}", figure, folder, **options), figure


def our_name(key: str, shape: list[int], model: nn.Module) -> str:
    [name] = get_record("efficientvim_m1").checkpoint_filter_fn({key: torch.zeros(shape)}, model)
    return name


@pytest.mark.parametrize("figure_name", FIGURES)
@torch.no_grad()
def test_logits_equal_the_official_ones(figure_name, tmp_path):
    model, figure = load(figure_name, tmp_path)
    assert_close("float32", model(figure_images(figure, torch.float32)), figure["logits"], 1e-4)
    assert_close("float64", model.double()(figure_images(figure)), figure["logits"], 1e-7)


@pytest.mark.parametrize("figure_name", FIGURES)
@torch.no_grad()
def test_maps_and_hidden_states_equal_the_official_ones(figure_name, tmp_path):
    model, figure = load(figure_name, tmp_path)
    x = model.double().stem(figure_images(figure))
    found = {"stem": x}
    for i, stage in enumerate(model.stages, start=1):
        x, state = stage(x)
        found |= {f"stage{i}": x, f"hidden{i}": state}
    for name, expected in figure["features"].items():
        actual = found[name]
        assert list(actual.shape) == expected["shape"]
        assert_close(
            f"{name} values", actual[0].flatten()[expected["flat_indices"]], expected["values"], 1e-8
        )
        assert_close(f"{name} std", actual.std(correction=0), expected["std"], 1e-8)
        assert abs(float(actual.mean()) - expected["mean"]) < 1e-8 * expected["std"]


@pytest.fixture(scope="module")
def training_step(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Tensor, dict]:
    """One forward and backward pass in training mode, in float64."""
    model, figure = load("M1", tmp_path_factory.mktemp("m1"))
    training = figure["training"]
    logits = model.double().train()(figure_images(training))
    loss = nn.functional.cross_entropy(logits, torch.tensor(training["targets"]))
    loss.backward()
    return model, logits, loss, training


def test_training_loss_and_logits_equal_the_official_ones(training_step):
    _, logits, loss, training = training_step
    assert_close("logits", logits[:, :4], training["logits_first4"], 1e-7)
    assert_close("loss", loss, training["loss"], 1e-9)


def test_training_gradients_equal_the_official_ones(training_step):
    model, _, _, training = training_step
    for key, expected in training["gradients"].items():
        gradient = model.get_parameter(our_name(key, expected["shape"], model)).grad
        if key.endswith("mixer.A"):
            assert gradient.abs().max() < 1e-12, f"{key} shifts a softmax, which cannot change the loss"
            continue
        assert_close(f"{key} norm", gradient.norm(), expected["l2"], 1e-6)
        assert_close(f"{key} first", gradient.flatten()[: len(expected["first"])], expected["first"], 1e-6)


def test_running_statistics_after_one_step_equal_the_official_ones(training_step):
    model, _, _, training = training_step
    for key, expected in training["batch_norm_buffers_after_one_forward"].items():
        buffer = model.get_buffer(our_name(key, [len(expected)], model))
        assert_close(key, buffer[: len(expected)], expected, 1e-7)


@pytest.mark.parametrize("size", ["m1", "m2", "m3", "m4"])
@pytest.mark.parametrize("suffix", ["", "_dist"], ids=["plain", "dist"])
def test_macs_are_within_two_percent_of_the_published_ones(size, suffix):
    record = get_record(f"efficientvim_{size}{suffix}")
    with torch.device("meta"):
        model = record.create().eval()
        images = torch.empty(1, *record.input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(record.published.macs_g, rel=0.02)


def timm_pair(name: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return our model and timm's with the same weights, and the official state dict."""
    theirs = pytest.importorskip("timm.models.efficientvim", reason="this timm has no EfficientViM")
    figure = read_figure(
        f"efficientvim/EfficientViM_{name.removeprefix('efficientvim_').upper()}".replace("DIST", "dist")
    )
    official = fill_checkpoint(figure["checkpoint"], figure["gain"])
    model = timm.create_model(name)
    model.load_state_dict(theirs.checkpoint_filter_fn(official, model))
    ours = lightspine.create_model(name, checkpoint={"model": official})
    return ours.double().eval(), model.double().eval(), official


@pytest.mark.parametrize("name", ["efficientvim_m1", "efficientvim_m1_dist"])
@torch.no_grad()
def test_official_weights_give_what_timm_gives_on_an_oblong_image(name):
    ours, theirs, _ = timm_pair(name)
    images = torch.randn(2, 3, 225, 161, dtype=torch.float64)
    assert_close("logits", ours(images), theirs(images), 1e-12)
    for i, (actual, expected) in enumerate(
        zip(
            ours.forward_intermediates(images, intermediates_only=True),
            theirs.forward_intermediates(images, intermediates_only=True),
            strict=True,
        )
    ):
        assert_close(f"stage {i}", actual, expected, 1e-12)


@pytest.mark.parametrize("name", ["efficientvim_m1", "efficientvim_m1_dist"])
@torch.no_grad()
def test_file_of_timm_loads(name, tmp_path):
    _, theirs, _ = timm_pair(name)
    path = write_official_file(tmp_path / "timm.pth", theirs.state_dict(), entry="state_dict")
    ours = lightspine.create_model(name, checkpoint=path).double().eval()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    assert_close("logits", ours(images), theirs(images), 1e-12)


def test_own_file_loads(tmp_path):
    saved = lightspine.create_model("efficientvim_m1_dist")
    path = write_official_file(tmp_path / "ours.pth", saved.state_dict())
    loaded = lightspine.create_model("efficientvim_m1_dist", checkpoint=path)
    assert loaded.load_report.dropped == []
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.fixture(scope="module")
def distilled_checkpoint() -> dict[str, Tensor]:
    return fill_checkpoint(read_figure("efficientvim/EfficientViM_M1_dist")["checkpoint"])


def test_distilled_file_in_a_plain_model_leaves_the_second_head_out(distilled_checkpoint):
    model = lightspine.create_model("efficientvim_m1", checkpoint={"model": distilled_checkpoint})
    dist = [key for key in distilled_checkpoint if "dist" in key]
    assert sorted(model.load_report.dropped) == sorted(dist)
    assert torch.equal(model.head.fc[0].weight, distilled_checkpoint["heads.0.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 7},
        {"num_classes": 0},
        {"features_only": True},
        {"features_only": True, "out_indices": (0,)},
    ],
    ids=["7-classes", "no-classes", "features", "first-stage"],
)
def test_official_file_loads_into_a_model_without_its_head(distilled_checkpoint, options):
    model = lightspine.create_model("efficientvim_m1", checkpoint=distilled_checkpoint, **options)
    weight = model.state_dict()[
        "model.stem.0.conv.weight" if "features_only" in options else "stem.0.conv.weight"
    ]
    assert torch.equal(weight, distilled_checkpoint["patch_embed.conv.0.conv.weight"])


def test_file_of_another_variant_is_refused(distilled_checkpoint):
    with pytest.raises(LightspineError, match="efficientvim_m2"):
        lightspine.create_model("efficientvim_m2", checkpoint=distilled_checkpoint)


def test_weight_decay_falls_on_the_published_parameters():
    model = lightspine.create_model("efficientvim_m1_dist")
    layout = read_figure("efficientvim/EfficientViM_M1_dist")["checkpoint"]
    expected = {
        our_name(key, shape, model)
        for key, shape in layout.items()
        if len(shape) > 1 and not key.endswith(".bias")
    }
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    [decayed] = [group["params"] for group in groups if group["weight_decay"] > 0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed} == expected
    assert {"norm.0.weight", "norm.3.weight", "stages.0.blocks.0.alpha"} <= expected


@torch.no_grad()
def test_initial_values_are_the_published_ones():
    model = lightspine.create_model("efficientvim_m1")
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            # Includes those that the official code first sets to zero and then overwrites.
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    parameters = dict(model.named_parameters())
    offsets = torch.cat([value for name, value in parameters.items() if name.endswith(".A")])
    assert 1 <= offsets.min() < 2.5 < 14.5 < offsets.max() <= 16
    assert offsets.mean() == pytest.approx(8.5, abs=1.2)
    assert (parameters["stages.1.blocks.0.alpha"] == 1e-4).all()
    assert parameters["stages.1.blocks.0.mixer.D"].item() == 1
    assert (model.head.weights == 1).all()
    assert model.head.fc[3].weight.std() == pytest.approx(0.02, rel=0.02)
    assert (model.head.fc[3].bias == 0).all()
    # PyTorch's own: uniform within 1 / sqrt(fan in).
    assert parameters["stages.1.blocks.0.mixer.hz_proj.weight"].abs().max() == pytest.approx(
        192**-0.5, rel=1e-2
    )


def test_distilled_model_returns_both_logits_in_training_and_their_mean_in_evaluation():
    model = lightspine.create_model("efficientvim_m1_dist", num_classes=10)
    features = torch.randn(2, model.num_features, 1, 1)
    both = model.train().forward_head(features)
    assert isinstance(both, tuple)
    assert not torch.equal(*both)
    torch.testing.assert_close(model.eval().forward_head(features), (both[0] + both[1]) / 2)


def test_distilled_training_can_be_switched_off():
    model = lightspine.create_model("efficientvim_m1_dist", num_classes=10).train()
    model.set_distilled_training(False)
    assert model.forward_head(torch.randn(2, model.num_features, 1, 1)).shape == (2, 10)


def test_distilled_training_of_a_plain_model_is_an_error():
    with pytest.raises(UsageError, match="distillation head"):
        lightspine.create_model("efficientvim_m1").set_distilled_training(True)


def test_new_classifier_of_a_distilled_model_keeps_type_and_mode():
    model = lightspine.create_model("efficientvim_m1_dist").double().eval()
    model.reset_classifier(5)
    assert [head.fc[0].weight.dtype for head in model.get_classifier()] == [torch.float64] * 2
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 5)


@torch.no_grad()
def test_features_end_with_the_normalised_final_map():
    model = lightspine.create_model("efficientvim_m1").eval()
    images = torch.randn(2, 3, 97, 161)
    features = model.forward_features(images)
    [final] = model.forward_intermediates(images, indices=[2], norm=True, intermediates_only=True)
    torch.testing.assert_close(features[:, -320:], final)
    hidden = features[:, :-320]
    torch.testing.assert_close(hidden, hidden[:, :, :1, :1].expand_as(hidden))


@torch.no_grad()
def test_stopping_early_gives_the_same_maps():
    model = lightspine.create_model("efficientvim_m1").eval()
    images = torch.randn(2, 3, 97, 161)
    last, [first] = model.forward_intermediates(images, indices=[0], stop_early=True)
    expected = model.forward_intermediates(images, intermediates_only=True)[0]
    assert torch.equal(first, expected)
    assert torch.equal(last, expected)


@torch.no_grad()
def test_model_with_the_mixer_of_the_comparison_runs():
    model = lightspine.create_model("efficientvim_m1", mixer="nc-ssd", expand=0.5, num_classes=10).eval()
    assert model(torch.randn(2, 3, 97, 161)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "ssd"}, "mixer must be 'hsm-ssd' or 'nc-ssd', got 'ssd'"),
        ({"depths": (2, 2)}, "one positive entry per stage"),
        ({"depths": (2, 0, 2)}, "one positive entry per stage"),
        ({"state_dims": (49, 0, 9)}, "positive dim, state_dim"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"global_pool": ""}, "num_classes=1000"),
    ],
    ids=["mixer", "lengths", "no-block", "no-state", "pool", "no-pool"],
)
def test_wrong_argument_is_named(options, message):
    with pytest.raises(UsageError, match=message):
        lightspine.create_model("efficientvim_m1", **options)


def test_unknown_output_format_is_named():
    model = lightspine.create_model("efficientvim_m1", num_classes=0)
    with pytest.raises(UsageError, match="'NLC'"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")


def test_removing_stages_under_the_classifier_is_an_error():
    model = lightspine.create_model("efficientvim_m1", num_classes=10)
    with pytest.raises(UsageError, match="prune_head=True"):
        model.prune_intermediate_layers([0], prune_head=False)
