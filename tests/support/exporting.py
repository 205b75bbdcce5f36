"""Small models with randomized weights, for comparing a model with its export."""

from typing import Any

import pytest
import torch
from torch import nn

import lightspine
from lightspine.models import get_record

# Two stages of one block have every kind of layer.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vmamba": ("vmamba_tiny", {"embed_dims": (16, 32), "depths": (1, 1)}),
    "vim": ("vim_tiny", {"dim": 32, "depth": 2}),
    "efficientvim": ("efficientvim_m1", {"dims": (16, 24), "depths": (1, 1), "state_dims": (9, 9)}),
    "shvit": ("shvit_s1", {"embed_dims": (16, 64), "depths": (1, 1), "partial_dims": (None, 16)}),
    "efficientmod": (
        "efficientmod_xxs",
        {"embed_dims": (8, 16), "depths": (1, 1), "attention_depths": (0, 1), "attention_mlp_ratios": (4, 4)},
    ),
}
FAMILIES = list(SMALL)


def disturb(model: nn.Module) -> nn.Module:
    """Randomize norms, gates and layer scales, whose initial 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif tensor.is_floating_point() and tensor.dim() < 3:
                tensor.add_(0.1 * (noise - 0.5) if tensor.dim() == 2 else 0.6 * (noise - 0.5))
    return model.eval()


def small_model(family: str, **options: Any) -> nn.Module:
    """Create a small model of a family with disturbed weights, in evaluation mode."""
    name, sizes = SMALL[family]
    torch.manual_seed(0)
    return disturb(lightspine.create_model(name, **sizes | options))


def registered_models() -> list[Any]:
    """Return all model names as test parameters; all but the smallest of a family are marked slow."""
    records = [get_record(name) for name in lightspine.list_models()]
    least = {
        min((r for r in records if r.family == family), key=lambda r: r.params).name
        for family in {r.family for r in records}
    }
    return [pytest.param(r.name, marks=() if r.name in least else pytest.mark.slow) for r in records]
