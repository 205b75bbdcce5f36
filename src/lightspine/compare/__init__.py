"""Compare several models: train them on the same images, measure them, plot accuracy over latency.

The modules `compare` and `runs` import Lightning; this module and `results` do not.
"""

from collections.abc import Sequence

from lightspine.errors import UsageError
from lightspine.models.loading import is_published
from lightspine.models.registry import timm_name

__all__ = ["check_model_names"]


def check_model_names(names: Sequence[str]) -> None:
    """Check that every name is a distinct model of lightspine or timm, or published weights of a model.

    No model is built.

    Raises:
        UsageError: a name is unknown or repeated, or there is none.
    """
    if not names:
        raise UsageError("expected at least one model name, got none")
    for position, name in enumerate(names):
        if not is_published(name):
            timm_name(name)  # checks the name
        if name in names[:position]:
            raise UsageError(f"expected each model once, got {name} twice")
