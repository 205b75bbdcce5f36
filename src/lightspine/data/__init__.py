"""Images from disk and from scikit-learn. `data.modules` adds Lightning, which is slow to import."""

from lightspine.data.digits import DigitsDataset, export_digits
from lightspine.data.image_folder import (
    FolderSplits,
    ImageFolderDataset,
    Sample,
    collate_images,
    list_images,
    scan_image_folder,
)
from lightspine.data.images import MIN_SIDE, open_image
from lightspine.data.transforms import (
    AUGMENTATIONS,
    Preprocessing,
    create_eval_transform,
    create_train_transform,
)

__all__ = [
    "AUGMENTATIONS",
    "MIN_SIDE",
    "DigitsDataset",
    "FolderSplits",
    "ImageFolderDataset",
    "Preprocessing",
    "Sample",
    "collate_images",
    "create_eval_transform",
    "create_train_transform",
    "export_digits",
    "list_images",
    "open_image",
    "scan_image_folder",
]
