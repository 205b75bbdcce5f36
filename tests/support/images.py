"""Small images and folders of images for the tests of data, training and evaluation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"

COLOURS = {"blue": (30, 40, 220), "green": (30, 200, 60), "red": (220, 40, 30)}


def write_image(
    path: Path, colour: tuple[int, int, int], *, size: tuple[int, int] = (40, 40), seed: int = 0
) -> Path:
    """Save a noisy image of one color, whose class is easy to learn."""
    noise = np.random.default_rng(seed).integers(-25, 26, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_folder(root: Path, *, count: int = 8, splits: tuple[str, ...] = ("",)) -> Path:
    """Write `root/SPLIT/{blue,green,red}/*.jpg`."""
    for number, split in enumerate(splits):
        for name, colour in COLOURS.items():
            for i in range(count):
                write_image(root / split / name / f"{i}.jpg", colour, seed=1000 * number + i)
    return root


def truncate(path: Path) -> Path:
    """Cut a file off after two thirds of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def shared_archive(name: str) -> Path:
    """Return the path of an archive of real images; skip the test if it is missing."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"needs {name} in a folder shared/data beside the checkout")
    return path
