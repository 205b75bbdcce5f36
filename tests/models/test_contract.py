"""Contract tests of registered models (CONTRIBUTING.md, "The model contract"): timm interface, any size."""

import io
import math
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, fx, nn

import lightspine
from lightspine.errors import UsageError
from lightspine.models import ModelRecord, get_record

RECORDS = [get_record(name) for name in lightspine.list_models()]


def is_smallest(record: ModelRecord) -> bool:
    return record.params == min(other.params for other in RECORDS if other.family == record.family)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(record.name, marks=() if is_smallest(record) else pytest.mark.slow) for record in RECORDS
    ],
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    """The published model in evaluation mode; shared, so tests must not change it."""
    torch.manual_seed(0)
    return lightspine.create_model(name).eval()


def small(name: str, **options: Any) -> nn.Module:
    return lightspine.create_model(name, **{"num_classes": 42, "drop_path_rate": 0.0} | options)


def images(height: int = 64, width: int = 64, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width)


def together(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Concatenate the logits of a distilled model in training mode."""
    return output if isinstance(output, Tensor) else torch.cat(output)


def names_of(cfg_entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (cfg_entry,) if isinstance(cfg_entry, str) else tuple(cfg_entry)


def patched(model: nn.Module, side: int) -> int:
    """Return the pixels of a side that the stem covers; overlapping patches without padding lose a border."""
    conv = model.get_submodule(names_of(model.default_cfg["first_conv"])[0])
    return side - max(0, conv.kernel_size[0] - conv.stride[0] - 2 * conv.padding[0])


@torch.no_grad()
def test_forward_at_the_published_size(name, model):
    _, height, width = get_record(name).input_size
    logits = model(images(height, width, batch=1))
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47), (97, 161), (225, 250)], ids=str)
@torch.no_grad()
def test_forward_at_any_size(model, size):
    logits = model(images(*size))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()


@torch.no_grad()
def test_images_of_a_batch_do_not_touch_each_other(model):
    batch = images(64, 96)
    expected = torch.cat([model(image[None]) for image in batch])
    torch.testing.assert_close(model(batch), expected, rtol=1e-3, atol=1e-4)


def test_number_of_parameters_is_the_registered_one(name, model):
    assert sum(parameter.numel() for parameter in model.parameters()) == get_record(name).params


def test_attributes_agree_with_the_configuration(name, model):
    cfg = model.default_cfg
    assert model.num_classes == cfg["num_classes"] == 1000
    assert tuple(cfg["input_size"]) == get_record(name).input_size
    # timm builds the architecture, and has models of its own of some names.
    assert cfg["architecture"] in (name, f"lightspine_{name}")
    assert type(timm.create_model(cfg["architecture"])) is type(model)
    assert not cfg["fixed_input_size"]
    assert {"mean", "std", "crop_pct", "interpolation"} <= cfg.keys()


def test_names_of_the_configuration_are_in_the_state_dict(model):
    state = model.state_dict()
    for first in names_of(model.default_cfg["first_conv"]):
        assert state[f"{first}.weight"].shape[1] == 3
    for classifier in names_of(model.default_cfg["classifier"]):
        assert state[f"{classifier}.weight"].shape[0] == 1000
        assert state[f"{classifier}.bias"].shape == (1000,)


def test_undecayed_names_are_parameters(model):
    assert set(model.no_weight_decay()) <= dict(model.named_parameters()).keys()


def test_layer_decay_gives_the_stem_the_smallest_rate_and_the_head_the_largest(model):
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    rates = {key: scale[id(parameter)] for key, parameter in model.named_parameters()}
    first = rates[f"{names_of(model.default_cfg['first_conv'])[0]}.weight"]
    last = rates[f"{names_of(model.default_cfg['classifier'])[0]}.weight"]
    assert first == min(rates.values()) < last == max(rates.values()) == 1.0


@torch.no_grad()
def test_features_have_the_promised_shape(name, model):
    _, height, width = get_record(name).input_size
    features = model.forward_features(images(height, width, batch=1))
    channel_axis = 1 if features.ndim == 4 else 2
    assert features.shape[channel_axis] == model.num_features
    if features.ndim == 4:
        assert tuple(features.shape[2:]) == tuple(model.default_cfg["pool_size"])


@torch.no_grad()
def test_forward_is_the_head_of_the_features(model):
    x = images(64, 96)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("num_classes", [0, 7])
@torch.no_grad()
def test_reset_classifier_replaces_the_head(name, num_classes):
    model = small(name).eval()
    model.reset_classifier(num_classes)
    assert model.num_classes == num_classes
    assert model(images()).shape == (2, num_classes or model.num_features)


@torch.no_grad()
def test_model_without_head_and_pooling_gives_the_features(name):
    x, built = images(), small(name, num_classes=0, global_pool="").eval()
    reset = small(name).eval()
    reset.reset_classifier(0, "")
    for model in (built, reset):
        torch.testing.assert_close(model(x), model.forward_features(x))


@pytest.mark.parametrize("options", [{}, {"feature_cls": "getter"}], ids=["default", "getter"])
@torch.no_grad()
def test_features_only_gives_the_promised_pyramid(name, options):
    model = lightspine.create_model(name, features_only=True, **options).eval()
    maps = model(images(96, 96))
    assert len(maps) == len(model.feature_info.channels()) >= 3
    for found, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        side = math.ceil(patched(model.model, 96) / reduction)
        assert found.shape == (2, channels, side, side)
        assert found.isfinite().all()


@pytest.mark.parametrize("size", [(33, 47), (97, 161)], ids=str)
@torch.no_grad()
def test_features_only_takes_any_size(name, size):
    model = lightspine.create_model(name, features_only=True).eval()
    for found, reduction in zip(model(images(*size)), model.feature_info.reduction(), strict=True):
        for actual, side in zip(found.shape[2:], size, strict=True):
            # Whether a partial patch counts depends on the stem.
            covered = patched(model.model, side)
            assert max(1, covered // reduction) <= actual <= math.ceil(covered / reduction)


@torch.no_grad()
def test_features_only_gives_the_levels_asked_for(name, model):
    wrapped = lightspine.create_model(name, features_only=True, out_indices=(0, -2)).eval()
    wrapped.model.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in wrapped.model.state_dict()}
    )
    x = images()
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert wrapped.feature_info.channels() == [expected[i].shape[1] for i in (0, -2)]
    for found, i in zip(wrapped(x), (0, -2), strict=True):
        torch.testing.assert_close(found, expected[i])


def test_level_list_without_features_only_is_an_error(name):
    with pytest.raises((TypeError, UsageError), match="out_indices"):
        lightspine.create_model(name, out_indices=(0, 1))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_intermediates_end_with_the_features(name, model, checkpointing):
    model = lightspine.create_model(name).eval() if checkpointing else model
    model.set_grad_checkpointing(checkpointing)
    x = images(96, 64)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    for found, info in zip(maps, model.feature_info, strict=True):
        height, width = (math.ceil(patched(model, side) / info["reduction"]) for side in (96, 64))
        assert found.shape == (2, info["num_chs"], height, width)


@torch.no_grad()
def test_intermediates_can_be_chosen(model):
    x = images()
    every = model.forward_intermediates(x, intermediates_only=True)
    for indices, chosen in ((2, every[-2:]), ([0, -1], [every[0], every[-1]])):
        for found, expected in zip(
            model.forward_intermediates(x, indices=indices, intermediates_only=True), chosen, strict=True
        ):
            torch.testing.assert_close(found, expected)
    _, [first] = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(first, every[0])


def test_every_parameter_receives_a_gradient(name):
    model = small(name).train()
    together(model(images())).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_gradient_checkpointing_changes_nothing(name):
    model, x = small(name).eval(), images()
    results = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        logits = model(x)
        logits.square().mean().backward()
        first = names_of(model.default_cfg["first_conv"])[0]
        results.append((logits.detach(), model.get_parameter(f"{first}.weight").grad.clone()))
    (plain, plain_gradient), (checked, checked_gradient) = results
    torch.testing.assert_close(checked, plain)
    torch.testing.assert_close(checked_gradient, plain_gradient)


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit:FutureWarning", r"ignore:.*torch\.jit:DeprecationWarning")
@torch.no_grad()
def test_scripted_model_gives_the_same(model):
    x = images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@torch.no_grad()
def test_traced_model_gives_the_same(model):
    x = images()
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_traced_model_trains(name):
    model = small(name).train()
    traced = fx.symbolic_trace(model)
    together(traced(images())).square().mean().backward()
    assert [key for key, parameter in traced.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("channels", [1, 5])
@torch.no_grad()
def test_number_of_input_channels_is_honoured(name, channels):
    assert small(name, in_chans=channels).eval()(images(channels=channels)).shape == (2, 42)


@pytest.mark.parametrize("option", ["drop_rate", "drop_path_rate"])
@torch.no_grad()
def test_dropping_is_random_in_training_only(name, option):
    model, x = small(name, **{option: 0.5}).train(), images()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1.0)  # SHViT starts with branches that give zero, dropped or not
    assert not torch.equal(together(model(x)), together(model(x)))
    model.eval()
    assert torch.equal(model(x), model(x))


@torch.no_grad()
def test_without_dropping_training_is_not_random(name):
    model, x = small(name).train(), images()
    assert torch.equal(together(model(x)), together(model(x)))


def test_unknown_argument_is_rejected(name):
    with pytest.raises((TypeError, UsageError), match="no_such_argument"):
        lightspine.create_model(name, no_such_argument=1)


@torch.no_grad()
def test_saved_weights_load_strictly(name, model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = lightspine.create_model(name).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = images()
    assert torch.equal(other(x), model(x))


def test_timm_creates_a_model_that_only_lightspine_has():
    model = timm.create_model("vmamba_tiny", num_classes=5)
    assert type(model).__module__ == "lightspine.models.vmamba"
    assert model.num_classes == 5


@pytest.mark.parametrize("name", ["shvit_s1", "efficientvim_m1", "efficientvim_m1_dist"])
def test_models_of_timm_stay_its_own(name):
    pytest.importorskip(f"timm.models.{get_record(name).family}", reason="this timm does not have the family")
    assert timm.model_entrypoint(name).__module__ == f"timm.models.{get_record(name).family}"
    assert type(lightspine.create_model(name)).__module__ == f"lightspine.models.{get_record(name).family}"
