"""Results of an analysis: figures, arrays and files."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightspine.analysis.figure_grid import Panel, draw_grid
from lightspine.analysis.image_input import ImageInput
from lightspine.errors import UsageError
from lightspine.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 7
"""Maximum number of panels per row of the figure of one image."""


@dataclass(frozen=True)
class ImageResult(ABC):
    """Maps of one image; base class of the results of most analyses.

    Attributes:
        image: the preprocessed image.
        model: name of the model, and whether it is trained.
    """

    image: ImageInput
    model: str

    @abstractmethod
    def rows(self) -> list[list[Panel]]:
        """Return the maps as rows of the figure; a contact sheet concatenates the rows."""

    def image_panel(self) -> Panel:
        """Return the panel of the image, the first of the figure."""
        return input_panel(self.image)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, among them "image", the preprocessed image (H, W, 3), uint8."""
        return {"image": self.image.display}

    def heading(self) -> str:
        """Return the text above the figure."""
        return self.model

    def caption(self) -> str:
        """Return the text below the figure, which explains the scales."""
        return ""

    def figure(self) -> "Figure":
        """Draw the image and the maps."""
        return draw_results([self])


def draw_results(results: Sequence[ImageResult], names: Sequence[str] | None = None) -> "Figure":
    """Draw one image with its maps, or a contact sheet with one row per image.

    Args:
        results: results of the same analysis.
        names: names of the rows of a contact sheet; default: the names of the images.

    Raises:
        UsageError: the list is empty.
    """
    if not results:
        raise UsageError("expected at least one result to draw, got none")
    first = results[0]
    if len(results) == 1:
        return draw_grid(_single_image_rows(first), heading=first.heading(), caption=first.caption())
    rows = [[each.image_panel(), *(panel for row in each.rows() for panel in row)] for each in results]
    names = [each.image.name for each in results] if names is None else names
    return draw_grid(rows, names=names, heading=first.model, caption=first.caption())


def _single_image_rows(result: ImageResult) -> list[list[Panel | None]]:
    """Return the panels of one image: several rows below each other, a single long row wrapped."""
    rows = result.rows()
    if len(rows) > 1:
        return [[None if i else result.image_panel(), *row] for i, row in enumerate(rows)]
    line: list[Panel | None] = [result.image_panel(), *rows[0]]
    columns = -(-len(line) // -(-len(line) // MAX_COLUMNS))
    return [line[start : start + columns] for start in range(0, len(line), columns)]


def input_panel(image: ImageInput, mark: tuple[float, float] | None = None) -> Panel:
    """Create the panel of an image, with an optional cross at (y, x)."""
    height, width = image.size
    return Panel(f"image, {width}x{height} px", image.display, mark=mark)


def save_figure(figure: "Figure", base: Path) -> list[Path]:
    """Write BASE.png and BASE.svg atomically; the same figure gives the same bytes.

    Returns:
        The paths of the two files.

    Raises:
        LightspineError: a file cannot be written.
    """
    from matplotlib import rc_context

    paths = []
    # Neither dates nor random ids, so that a file in a repository changes only with its content.
    with rc_context({"svg.hashsalt": base.name}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            path = base.with_name(f"{base.name}.{kind}")
            with atomic_write(path) as file:
                figure.savefig(file, format=kind, metadata=metadata)
            paths.append(path)
    return paths


def save_arrays(arrays: Mapping[str, np.ndarray], base: Path) -> Path:
    """Write BASE.npz, compressed and atomically.

    Returns:
        The path of the file.

    Raises:
        LightspineError: the file cannot be written.
    """
    path = base.with_name(f"{base.name}.npz")
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **dict(arrays))
    return path
