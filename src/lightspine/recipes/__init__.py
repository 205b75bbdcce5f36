"""Complete training configurations that ship with the package: one YAML file is one run.

`classification/`, `detection/` and `segmentation/` have one recipe for each published row; the others finish
on a laptop or start from weights. What the papers print for a recipe stands in `published.csv`. Vim-base has
no recipe: the script of its training was not published.
"""

import csv
import difflib
from dataclasses import dataclass
from pathlib import Path

from lightspine.errors import UsageError

SCORES = ("top1", "box_ap", "mask_ap", "miou", "miou_ms")
"""The columns of `published.csv` that hold a score."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class PublishedRecipe:
    """What is printed about the run that a recipe repeats.

    Attributes:
        recipe: name of the recipe.
        model: name of the model.
        data: what it is trained on.
        top1: accuracy in percent; None where none is printed, as all scores.
        box_ap: average precision of a detector's boxes in percent.
        mask_ap: of its masks.
        miou: mean intersection over union of a segmenter in percent.
        miou_ms: the same tested at several sizes and mirrored.
        note: what the number stands for where it is not plain training.
        source: where it is printed.
    """

    recipe: str
    model: str
    data: str
    top1: float | None
    box_ap: float | None
    mask_ap: float | None
    miou: float | None
    miou_ms: float | None
    note: str
    source: str


def list_recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted: `classification/vim_tiny`, `digits_vim_tiny`, ..."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def list_published() -> list[PublishedRecipe]:
    """Return the recipes that repeat a published run, in the order of the families' papers."""
    with (_FOLDER / "published.csv").open(newline="") as file:
        return [
            PublishedRecipe(**row | {key: float(row[key]) if row[key] else None for key in SCORES})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]


def describe_recipe(name: str) -> str:
    """Return the first line of a recipe: what it does, in a sentence."""
    first = find_recipe(name).read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip()


def find_recipe(name: str | Path) -> Path:
    """Return the file of a shipped recipe, or the path itself where it is a file.

    Args:
        name: such as `digits_vim_tiny` or `classification/vim_tiny`, or a path.

    Raises:
        UsageError: neither a recipe nor a file.
    """
    if Path(name).is_file():
        return Path(name)
    names = list_recipes()
    if str(name) not in names:
        # `vim_tiny` is close to `classification/vim_tiny` by its last part only.
        close = [known for known in names if known.rpartition("/")[2] == str(name)]
        close = close or difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(
            f"expected a file or the name of a recipe, got {str(name)!r}: {hint}"
            "`lightspine recipes` lists them"
        )
    return _FOLDER / f"{name}.yaml"
