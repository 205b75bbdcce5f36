"""Checks that cost nothing, to be made before hours of training."""

from collections.abc import Sequence

import timm

from lightspine.errors import UsageError
from lightspine.models import find_record
from lightspine.models.registry import unknown_model


def check_model_names(names: Sequence[str]) -> None:
    """Check that every name is a model of ours or of timm, and that none is given twice.

    Raises:
        UsageError: no name, an unknown one (the closest are given), or one given twice.
    """
    if not names:
        raise UsageError("expected at least one model name, got none")
    for position, name in enumerate(names):
        if find_record(name) is None and not timm.is_model(name):
            raise unknown_model(name)
        if name in names[:position]:
            raise UsageError(f"expected each model once, but {name} is given twice")
