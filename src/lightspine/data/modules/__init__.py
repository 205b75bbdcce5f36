"""The data sets as Lightning data modules; any of them can be named in a recipe."""

from lightspine.data.modules.base import ImageDataModule, SourceDataModule
from lightspine.data.modules.coco import CocoDataModule
from lightspine.data.modules.digits import DigitsDataModule
from lightspine.data.modules.hugging_face import HuggingFaceDataModule
from lightspine.data.modules.image_folder import ImageFolderDataModule
from lightspine.data.modules.image_list import ImageListDataModule
from lightspine.data.modules.imagenet import ImageNetDataModule
from lightspine.data.modules.segmentation import (
    CocoSemanticDataModule,
    SegmentationDataModule,
    SegmentationFolderDataModule,
)
from lightspine.data.modules.shards import ShardDataModule

__all__ = [
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
    "SourceDataModule",
]
