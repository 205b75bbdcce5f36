"""EfficientMod's context maps and EfficientViM's importance maps, against the modules' own values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightspine
from lightspine.analysis import context, importance, open_model
from lightspine.analysis.mixer_maps import written_and_read
from lightspine.errors import UsageError
from support.images import write_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "a.png", (9, 99, 200), size=(150, 120))


@pytest.fixture(scope="module")
def efficientmod() -> nn.Module:
    return lightspine.create_model("efficientmod_xxs", num_classes=3).eval()


@pytest.fixture(scope="module")
def efficientvim() -> nn.Module:
    return lightspine.create_model("efficientvim_m1", num_classes=3).eval()


def test_context_is_the_mean_of_what_multiplies_the_values(efficientmod: nn.Module, image: Path) -> None:
    (result,) = context(open_model(efficientmod, size=(70, 97)), [image], stage=1)
    module = efficientmod.get_submodule(result.modules[0])
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        efficientmod(result.image.pixels)
        handle.remove()
        expected = module(inputs[0])[0].mean(-1)
    np.testing.assert_allclose(result.contexts[0], expected, rtol=1e-4, atol=1e-6)


def test_last_context_of_every_stage_is_shown_by_default(efficientmod: nn.Module, image: Path) -> None:
    (result,) = context(open_model(efficientmod, size=64), [image])
    assert [name.split(".")[1] for name in result.modules] == ["0", "1", "2", "3"]


def test_maps_of_one_position_are_left_out(efficientmod: nn.Module, image: Path) -> None:
    (result,) = context(open_model(efficientmod, size=32), [image])
    assert [values.shape for values in result.contexts] == [(8, 8), (4, 4), (2, 2)]


def test_what_is_written_makes_the_hidden_state(efficientvim: nn.Module) -> None:
    name = "stages.1.blocks.0.mixer"
    mixer, seen = efficientvim.get_submodule(name), {}
    handles = [
        mixer.bcdt_proj.register_forward_pre_hook(lambda _, given: seen.update(x=given[0])),
        mixer.hz_proj.register_forward_pre_hook(lambda _, given: seen.update(state=given[0])),
    ]
    pixels = torch.randn(1, 3, 160, 224)
    write, _ = written_and_read(efficientvim, {name: mixer}, pixels)[name]
    for handle in handles:
        handle.remove()
    state = torch.einsum("nhw,chw->nc", write, seen["x"][0])
    torch.testing.assert_close(state, seen["state"][0], rtol=1e-4, atol=1e-5)


def test_what_is_read_turns_the_state_into_the_output(efficientvim: nn.Module) -> None:
    name = "stages.1.blocks.0.mixer"
    mixer, seen = efficientvim.get_submodule(name), {}
    handle = mixer.bcdt_proj.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    _, read = written_and_read(efficientvim, {name: mixer}, torch.randn(1, 3, 160, 224))[name]
    handle.remove()
    with torch.no_grad():
        output, state = mixer.forward_with_state(seen["x"])
    torch.testing.assert_close(torch.einsum("nhw,cn->chw", read, state[0]), output[0], rtol=1e-4, atol=1e-5)


def test_importance_is_a_share_of_every_position(efficientvim: nn.Module, image: Path) -> None:
    (result,) = importance(open_model(efficientvim, size=(97, 161)), [image])
    assert [values.shape for values in result.writes] == [(7, 11), (4, 6), (2, 3)]
    for values in (*result.writes, *result.reads):
        assert values.sum() == pytest.approx(1)
        assert (values >= 0).all()


def test_models_of_other_families_are_refused(efficientvim: nn.Module, image: Path) -> None:
    with pytest.raises(UsageError, match=r"efficientvim_m1 has no context layers, expected .* EfficientMod"):
        context(open_model(efficientvim, size=64), [image])
    with pytest.raises(UsageError, match=r"shvit_s1 has no hidden-state mixers, expected .* EfficientViM"):
        importance(open_model("shvit_s1", size=64), [image])
