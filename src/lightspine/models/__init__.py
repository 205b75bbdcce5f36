"""Model families, one module each; importing this package registers all their models.

Other packages add families through entry points of the group "lightspine.families", whose value is the module
that registers the models.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from lightspine.errors import LightspineError
from lightspine.models.registry import (
    ModelRecord,
    Published,
    build_model,
    find_record,
    get_record,
    list_models,
    register_model,
)

# Importing every module here registers the families, so that a new one needs no entry in a list.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

for _entry in entry_points(group="lightspine.families"):
    try:
        _entry.load()
    except Exception as _error:
        raise LightspineError(
            f"the family {_entry.name!r} of another package cannot be imported from {_entry.value}: {_error}"
        ) from _error

__all__ = [
    "ModelRecord",
    "Published",
    "build_model",
    "find_record",
    "get_record",
    "list_models",
    "register_model",
]
