"""Small members of every model family, with random weights that let every branch contribute."""

from typing import Any

import torch
from torch import nn

import lightspine
from lightspine.models import get_record

_SMALLER: dict[str, dict[str, Any]] = {
    "efficientmod": {
        "embed_dims": (8, 8, 16, 16),
        "depths": (1, 1, 1, 2),
        "attention_depths": (0, 0, 1, 1),
        "num_heads": 2,
    },
    "efficientvim": {"dims": (16, 16, 24), "depths": (1, 1, 2), "state_dims": (9, 4, 3)},
    "shvit": {"embed_dims": (16, 24, 32), "depths": (1, 1, 2), "partial_dims": (None, 6, 8)},
    "vim": {"dim": 16, "depth": 2, "state_dim": 4},
    "vmamba": {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
}

_RECORDS = [get_record(name) for name in lightspine.list_models()]
SMALLEST = {
    family: min((record for record in _RECORDS if record.family == family), key=lambda r: r.params or 0).name
    for family in sorted({record.family for record in _RECORDS})
}
"""Name of the smallest registered model of each family."""


def tiny_model(family: str, **options: Any) -> nn.Module:
    """Return a float64 model of a family in evaluation mode; a new family needs no entry above."""
    options = {"num_classes": 5} | _SMALLER.get(family, {}) | options
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = lightspine.create_model(SMALLEST[family], **options).double()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.2 if parameter.dim() == 1 else 0.05)
    # Statistics of the noise, so that no BatchNorm shrinks what follows.
    model.train()(tiny_images(8))
    return model.eval()


def tiny_images(batch: int = 2) -> torch.Tensor:
    """Return float64 images of 64 px."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, 64, 64, generator=draw, dtype=torch.float64)
