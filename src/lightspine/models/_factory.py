"""`create_model`: our models first, every other name through timm."""

from pathlib import Path
from typing import Any

import timm
import torch.nn as nn

from lightspine.models._registry import find_record, unknown_model


def create_model(name: str, *, checkpoint: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """Create a model by name."""
    record = find_record(name)
    if record is not None:
        return record.create(**kwargs)
    if not timm.is_model(name):
        raise unknown_model(name)
    return timm.create_model(name, **kwargs)
