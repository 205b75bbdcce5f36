"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 px, no download."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightspine.data.dataset import Batch, Item
from lightspine.data.transforms import Preprocessing
from lightspine.errors import UsageError
from lightspine.utils.image_files import MIN_SIDE

CLASS_NAMES = [str(digit) for digit in range(10)]

# The split is part of the dataset, so that all models and seeds are tested on the same digits.
_SPLIT_SEED = 0
_TEST_FRACTION = 0.2

_MAX_ANGLE = 10 * torch.pi / 180
_MAX_SCALE_CHANGE = 0.1
_MAX_SHIFT = 0.05


def digits_preprocessing(image_size: int) -> Preprocessing:
    """Return the preprocessing of digits resized to `image_size` px."""
    _check_size(image_size)
    return Preprocessing(
        input_size=(3, image_size, image_size),
        mean=(0.305,) * 3,
        std=(0.324,) * 3,
        interpolation="bilinear",
        crop_pct=1.0,
    )


class DigitsDataset(Dataset[Item]):
    """Dataset of scikit-learn's digits, resized bilinearly and normalized, with three identical channels.

    The dataset returns whole batches, so a data loader needs `collate_fn=lambda batch: batch`; wrapped in a
    `SeededDataset`, which reads one image at a time, it needs `collate_images`.

    Args:
        split: "train" (1,438 digits) or "test" (359, stratified by class); the split is fixed.
        image_size: height and width in pixels, at least 32.
        augment: rotate, scale and shift every digit at random, by at most 10 degrees, 10 % and 5 % of the
            side; no flips, which would turn a digit into another. Uses torch's global generator.

    Raises:
        UsageError: an image size below 32.
    """

    def __init__(
        self, split: Literal["train", "test"], *, image_size: int = 32, augment: bool = False
    ) -> None:
        preprocessing = digits_preprocessing(image_size)
        pixels, labels = _load_digits(split)
        self.pixels = _resize(pixels, image_size)
        self.labels = labels
        self.augment = augment
        self.mean, self.std = preprocessing.mean[0], preprocessing.std[0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        """Return one digit: image (3, S, S) float32 and its label."""
        images, labels, _ = self.__getitems__([index])
        return Item(images[0], int(labels[0]))

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return N digits: images (N, 3, S, S) float32 and labels (N,)."""
        pixels = self.pixels[indices]
        if self.augment:
            pixels = _augment_digits(pixels)
        images = ((pixels - self.mean) / self.std).repeat(1, 3, 1, 1)
        return Batch(images, self.labels[indices], [])


def export_digits(folder: str | Path, *, count: int = 10, image_size: int = 32) -> list[tuple[Path, str]]:
    """Write digits of the test split as PNG files, for example as input of `predict`.

    Args:
        folder: created if it does not exist.
        count: number of digits, taken from the classes in turn.
        image_size: height and width in pixels, at least 32.

    Returns:
        The path and the class name of every file.
    """
    _check_size(image_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = _load_digits("test")
    by_class = [(labels == digit).nonzero().flatten().tolist() for digit in range(10)]
    order = [indices[i] for i in range(max(map(len, by_class))) for indices in by_class if i < len(indices)]
    files = []
    for number, index in enumerate(order[:count]):
        path = folder / f"{number:03d}_digit_{labels[index]}.png"
        values = _resize(pixels[index : index + 1], image_size)[0, 0] * 255
        Image.fromarray(values.round().to(torch.uint8).numpy()).save(path)
        files.append((path, CLASS_NAMES[labels[index]]))
    return files


def _load_digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Return pixels (N, 1, 8, 8) from 0 to 1 and labels (N,) of a split."""
    # Imported here because importing scikit-learn takes about a second.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(_SPLIT_SEED)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        test[rng.permutation(members)[: round(len(members) * _TEST_FRACTION)]] = True
    chosen = test if split == "test" else ~test
    pixels = torch.from_numpy(images[chosen]).float().reshape(-1, 1, 8, 8) / 16
    return pixels, torch.from_numpy(labels[chosen]).long()


def _resize(pixels: Tensor, image_size: int) -> Tensor:
    return F.interpolate(pixels, size=(image_size, image_size), mode="bilinear", align_corners=False)


def _augment_digits(pixels: Tensor) -> Tensor:
    """Rotate, scale and shift every image of (N, 1, S, S) at random; uncovered pixels are black."""
    rotation, zoom, shift_x, shift_y = (torch.rand(4, len(pixels)) * 2 - 1).unbind()
    angle, scale = rotation * _MAX_ANGLE, 1 + zoom * _MAX_SCALE_CHANGE
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # Twice the shift, because grid coordinates run from -1 to 1.
    rows = [
        torch.stack([cos, -sin, 2 * _MAX_SHIFT * shift_x]),
        torch.stack([sin, cos, 2 * _MAX_SHIFT * shift_y]),
    ]
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _check_size(image_size: int) -> None:
    if image_size < MIN_SIDE:
        raise UsageError(f"expected an image size of at least {MIN_SIDE} px, got {image_size}")
