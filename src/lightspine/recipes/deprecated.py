"""Deprecated names in recipes and flags: replace them by the new ones with a FutureWarning."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

_PACKAGES = {"lightspine.tasks.": "lightspine.training."}
_MODEL_KEYS = {"publish": "export_weights"}

_MODEL_FLAG = re.compile(rf"--model\.(init_args\.)?(?P<key>{'|'.join(_MODEL_KEYS)})(?==|$)")


def upgrade_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a recipe with the new names of classes and keys.

    Args:
        recipe: content of a YAML file, or a part of it.
    """
    upgraded: dict[str, Any] = _upgrade_class_paths(recipe)
    model = upgraded.get("model")
    if isinstance(model, dict):
        upgraded["model"] = _upgrade_keys(model)
        if isinstance(model.get("init_args"), dict):
            upgraded["model"]["init_args"] = _upgrade_keys(model["init_args"])
    return upgraded


def upgrade_flags(flags: Sequence[str]) -> list[str]:
    """Return command-line flags with the new names of classes and keys."""
    upgraded = []
    for flag in flags:
        match = _MODEL_FLAG.match(flag)
        if match:
            new = _MODEL_KEYS[match["key"]]
            _warn(f"model.{match['key']}", f"model.{new}")
            flag = flag[: match.start("key")] + new + flag[match.end("key") :]
        name, equals, value = flag.rpartition("=")
        upgraded.append(name + equals + _upgrade_class_path(value))
    return upgraded


def _upgrade_class_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _upgrade_class_path(item)
            if key in ("class_path", "model", "data") and isinstance(item, str)
            else _upgrade_class_paths(item)
            for key, item in value.items()
        }
    return [_upgrade_class_paths(item) for item in value] if isinstance(value, list) else value


def _upgrade_class_path(path: str) -> str:
    for old, new in _PACKAGES.items():
        if path.startswith(old):
            upgraded = new + path.removeprefix(old)
            _warn(path, upgraded)
            return upgraded
    return path


def _upgrade_keys(settings: dict[str, Any]) -> dict[str, Any]:
    for old, new in _MODEL_KEYS.items():
        if old in settings:
            _warn(f"model.{old}", f"model.{new}")
    return {_MODEL_KEYS.get(key, key): value for key, value in settings.items()}


def _warn(old: str, new: str) -> None:
    message = f"{old} is deprecated and will be removed in the next release: use {new}"
    warnings.warn(message, FutureWarning, stacklevel=2)
