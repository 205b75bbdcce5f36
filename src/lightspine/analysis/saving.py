"""Figures as PNG and SVG and numbers as .npz, each file whole or not there."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightspine.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", base: Path) -> list[Path]:
    """Write BASE.png and BASE.svg and return their paths; the same figure gives the same bytes.

    Raises:
        LightspineError: a file cannot be written.
    """
    from matplotlib import rc_context

    paths = []
    # No date and no random names, so that a picture in a repository changes only when its content does.
    with rc_context({"svg.hashsalt": base.name}):
        for kind, about in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            path = base.with_name(f"{base.name}.{kind}")
            with atomic_write(path) as file:
                figure.savefig(file, format=kind, metadata=about)
            paths.append(path)
    return paths


def save_arrays(arrays: Mapping[str, np.ndarray], base: Path) -> Path:
    """Write BASE.npz, compressed, and return its path.

    Raises:
        LightspineError: the file cannot be written.
    """
    path = base.with_name(f"{base.name}.npz")
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **dict(arrays))
    return path
