"""Deprecated module: exported models run in the package `lightspine_runtime`."""

import importlib
import warnings
from typing import Any

_MOVED_TO = {
    "keep_freed_memory": "lightspine",
    "ClassScore": "lightspine_runtime",
    "OnnxModel": "lightspine_runtime",
    "Prediction": "lightspine_runtime",
    "predict": "lightspine_runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED_TO:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"lightspine.runtime.{name} is deprecated, use {_MOVED_TO[name]}.{name}", FutureWarning, stacklevel=2
    )
    return getattr(importlib.import_module(_MOVED_TO[name]), name)
