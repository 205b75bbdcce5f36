"""scikit-learn's digits for training."""

from typing import Any

from torch.utils.data import DataLoader

from lightspine.data.digits import CLASS_NAMES, DigitsDataset, digits_preprocessing
from lightspine.data.modules.base import ImageDataModule


class DigitsDataModule(ImageDataModule):
    """scikit-learn's handwritten digits with a fixed held-out test split; needs no download.

    Args:
        image_size: height and width in pixels that the 8 x 8 px digits are scaled to, at least 32.
        batch_size: digits per step and device.
        augment: turn, scale and shift the training digits at random.
        seed: order and augmentation of the digits, together with the epoch; the split is always the same.
    """

    def __init__(
        self, image_size: int = 32, batch_size: int = 64, augment: bool = True, seed: int = 0
    ) -> None:
        super().__init__(CLASS_NAMES, digits_preprocessing(image_size), batch_size, 0, seed)
        self.image_size = image_size
        self.augment = augment

    def train_dataloader(self) -> DataLoader:
        """Return batches (images (N, 3, S, S), labels (N,), [])."""
        return self._train_loader(DigitsDataset("train", image_size=self.image_size, augment=self.augment))

    def val_dataloader(self) -> DataLoader:
        """Return the held-out digits in batches (images (N, 3, S, S), labels (N,), [])."""
        return self._val_loader(DigitsDataset("test", image_size=self.image_size), _as_is)


def _as_is(batch: Any) -> Any:
    # The data set fetches a whole batch at once.
    return batch
