"""Complete training configurations that ship with the package: one YAML file is one run."""

from pathlib import Path

from lightspine.errors import UsageError

_FOLDER = Path(__file__).parent


def list_recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """Return the file of a shipped recipe, or the path itself where it is a file.

    Args:
        name: such as `digits_vim_tiny`, or a path.

    Raises:
        UsageError: neither a recipe nor a file; the recipes are listed.
    """
    if Path(name).is_file():
        return Path(name)
    path = _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(
            f"expected a file or one of the recipes {', '.join(list_recipes())}, got {str(name)!r}"
        )
    return path
