"""Lightning data modules; a recipe selects one by `class_path`."""

from lightspine.data.modules.base import ImageDataModule
from lightspine.data.modules.classification import (
    ClassificationDataModule,
    DigitsDataModule,
    HuggingFaceDataModule,
    ImageFolderDataModule,
    ImageListDataModule,
    ImageNetDataModule,
    ShardDataModule,
)
from lightspine.data.modules.detection import CocoDataModule
from lightspine.data.modules.segmentation import (
    CocoSemanticDataModule,
    SegmentationDataModule,
    SegmentationFolderDataModule,
)

__all__ = [
    "ClassificationDataModule",
    "CocoDataModule",
    "CocoSemanticDataModule",
    "DigitsDataModule",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageListDataModule",
    "ImageNetDataModule",
    "SegmentationDataModule",
    "SegmentationFolderDataModule",
    "ShardDataModule",
]
