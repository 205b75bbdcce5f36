"""Classes that a recipe may name: those of an allow-list, and packages that the user trusts.

A recipe is a file that people share. The name of a class in it is imported and called, so any other name
could run code.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import _common, set_parsing_settings

from lightspine.errors import LightspineError, UsageError
from lightspine.utils.yaml_text import check_yaml_text

# Modules with classes for a recipe; what is below them is allowed, too.
ALLOWED = (
    "lightspine",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.nn",
    "torch.optim",
    "timm.data",
    "timm.layers",
    "timm.loss",
    "timm.optim",
    "timm.scheduler",
    "torchvision.ops",
    "torchvision.transforms",
)
# Calls functions by their import path.
_DENIED = ("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")
_REFUSED = re.compile(r"Importing '([\w.]+)' is not allowed")


@contextmanager
def limit_class_paths(trusted: Sequence[str] = ()) -> Iterator[None]:
    """Let recipes and flags name only classes of `ALLOWED` and of trusted packages, and no file by address.

    Args:
        trusted: further packages or modules, such as "my_package".

    Raises:
        UsageError: a name is no import path.
    """
    for name in trusted:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(
                f"expected a package such as my_package for --trust-class-path, received {name!r}"
            )
    # The settings are those of the process, which may use jsonargparse for something else.
    before = dict(_common.parsing_settings)
    readers = _common.parsing_settings
    set_parsing_settings(
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*", *_DENIED],
        import_path_allowlist=[*ALLOWED, *trusted],
    )
    try:
        yield
    finally:
        readers.clear()
        readers.update(before)


def refused_class_path(message: str) -> str | None:
    """Return the import path that jsonargparse refused according to its message, or `None`."""
    found = _REFUSED.search(message)
    return found[1] if found else None


def refusal(path: str) -> UsageError:
    """Return the error for a class path outside the allow-list."""
    package = path.partition(".")[0]
    # Of a package with allowed modules only the name itself, not the whole package.
    known = any(name.partition(".")[0] == package for name in ALLOWED)
    return UsageError(
        f"refused to import {path}, which a recipe or flag names: expected a class of lightspine, or a "
        "usual one of lightning, torch, timm or torchvision; --trust-class-path "
        f"{path if known else package} allows it to run code"
    )


def read_recipe(path: Path) -> Any:
    """Return the content of a recipe without creating any object.

    Raises:
        UsageError: it is no YAML in UTF-8, too large or too deep.
        LightspineError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml_text(text, "recipe")
        return yaml.safe_load(text)
    except OSError as error:
        raise LightspineError(f"cannot read {path}: {error.strerror or error}") from error
    except UsageError:
        raise
    # ValueError for another encoding and for dates that do not exist.
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"expected a recipe in YAML, but {path} is not: {reason}") from error
