"""The model families, one module each; importing this package registers them all."""

import importlib
import pkgutil

from lightspine.models._registry import (
    ModelRecord,
    Published,
    find_record,
    get_record,
    list_models,
    register_model,
)

# A family is any module here without a leading underscore: a sixth one registers itself without an edit.
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ModelRecord", "Published", "find_record", "get_record", "list_models", "register_model"]
