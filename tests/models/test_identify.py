"""Identify the family and variant of a checkpoint from its tensors."""

import pytest
import torch

import lightspine
from lightspine.models.loading import identify_tensors
from support.reference import FIGURES, read_figure

PUBLISHED = {
    "efficientmod/efficientMod_xxs": "efficientmod_xxs",
    "efficientmod/efficientMod_s": "efficientmod_s",
    "efficientmod/efficientMod_s_Conv": "efficientmod_s_conv",
    "efficientvim/EfficientViM_M1": "efficientvim_m1",
    "efficientvim/EfficientViM_M1_dist": "efficientvim_m1_dist",
    "efficientvim/EfficientViM_M4": "efficientvim_m4",
    "shvit/shvit_s1": "shvit_s1",
    "shvit/shvit_s1_dist": "shvit_s1_dist",
    "shvit/shvit_s4": "shvit_s4",
    "vim/vim_tiny": "vim_tiny",
    "vim/vim_tiny_stride8": "vim_tiny_plus",
    "vim/vim_base": "vim_base",
    "vmamba/vmambav2v_tiny": "vmamba_tiny",
    "vmamba/vmambav2_tiny": "vmamba_tiny_s2l5",
    "vmamba/vmambav0_small": "vmamba_small_v0",
    "vmamba/vmambav2_base": "vmamba_base",
}


def _layout(figure: str) -> dict[str, torch.Tensor]:
    shapes = read_figure(figure)["checkpoint"]
    return {key: torch.empty(tuple(shape), device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("figure", PUBLISHED, ids=lambda figure: figure.split("/")[1])
def test_published_layout_is_identified(figure):
    found = identify_tensors(_layout(figure))
    assert found.name == PUBLISHED[figure]
    assert found.exact


def test_own_layout_is_identified():
    with torch.device("meta"):
        tensors = lightspine.create_model("efficientmod_xs").state_dict()
    assert identify_tensors(tensors).name == "efficientmod_xs"


def test_ablation_is_the_nearest_variant_and_not_exact():
    found = identify_tensors(_layout("vim/vim_tiny_uni"))
    assert (found.name, found.exact) == ("vim_tiny", False)
    assert str(found) == f"vim_tiny ({found.fitting} of 415 tensors fit)"


def test_foreign_network_is_not_identified():
    with torch.device("meta"):
        tensors = lightspine.create_model("resnet18").state_dict()
    assert identify_tensors(tensors) is None


def test_every_family_has_figures():
    families = {lightspine.models.get_record(name).family for name in lightspine.list_models()}
    assert families <= {path.name for path in FIGURES.iterdir() if path.is_dir()}
