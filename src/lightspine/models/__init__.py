"""The model families, one module each; importing this package registers them all.

Families of other packages register themselves too, where an installed package names their module as an entry
point of the group "lightspine.families".
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from lightspine.errors import LightspineError
from lightspine.models._build import build_model
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
