"""What every map of one image has in common: panels for a figure, arrays for a file."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightspine.analysis.pictures import Picture
from lightspine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_COLUMNS = 7


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        title: above it.
        values: (h, w), numbers drawn on a scale from 0 to their maximum; or (H, W, 3), an image.
        over: draw the values half transparent over this image.
        mark: (y, x) in pixels of the image, drawn as a cross.
        size: height and width in pixels that the values stand for; by default those of the image.
        root: let the brightness grow with the square root, for maps with few large values.
    """

    title: str
    values: np.ndarray
    over: Picture | None = None
    mark: tuple[float, float] | None = None
    size: tuple[int, int] | None = None
    root: bool = False


@dataclass(frozen=True)
class ImageResult(ABC):
    """Maps of one image. `figure()` draws them, `arrays()` are what a .npz file holds.

    Attributes:
        picture: the image as the network saw it.
        subject: name of the network and whether it was trained.
    """

    picture: Picture
    subject: str

    @abstractmethod
    def rows(self) -> list[list[Panel]]:
        """Return the maps by row of the figure; a contact sheet joins the rows."""

    def image_panel(self) -> Panel:
        """Return what stands before the maps: the image."""
        return picture_panel(self.picture)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the numbers by name, the image as the network saw it among them, (H, W, 3) uint8."""
        return {"image": self.picture.shown}

    def heading(self) -> str:
        """Return the line above the figure."""
        return self.subject

    def caption(self) -> str:
        """Return the small print: how to read the figure."""
        return ""

    def figure(self) -> "Figure":
        """Draw the image and the maps."""
        return draw_results([self])


def draw_results(results: Sequence[ImageResult]) -> "Figure":
    """Draw one image with its maps, or a contact sheet with one row per image.

    Args:
        results: of the same analysis.

    Raises:
        UsageError: there is nothing to draw.
    """
    # matplotlib is loaded by what draws, not by what computes.
    from lightspine.analysis.sheet import draw_sheet

    if not results:
        raise UsageError("a figure needs at least one result, got none")
    first = results[0]
    if len(results) == 1:
        return draw_sheet(_alone(first), heading=first.heading(), caption=first.caption())
    rows = [[each.image_panel(), *(panel for row in each.rows() for panel in row)] for each in results]
    names = [each.picture.name for each in results]
    return draw_sheet(rows, names=names, heading=first.subject, caption=first.caption())


def _alone(result: ImageResult) -> list[list[Panel | None]]:
    """Return the rows of a single image: several one below the other, one wrapped where it is long."""
    rows = result.rows()
    if len(rows) > 1:
        return [[None if i else result.image_panel(), *row] for i, row in enumerate(rows)]
    line: list[Panel | None] = [result.image_panel(), *rows[0]]
    columns = -(-len(line) // -(-len(line) // MOST_COLUMNS))
    return [line[start : start + columns] for start in range(0, len(line), columns)]


def picture_panel(picture: Picture, mark: tuple[float, float] | None = None) -> Panel:
    """Return the image itself as a panel."""
    height, width = picture.size
    return Panel(f"image, {width}x{height} px", picture.shown, mark=mark)
