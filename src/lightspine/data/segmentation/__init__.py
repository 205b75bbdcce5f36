"""Images with label maps."""

from lightspine.data.segmentation.batch import (
    SegmentationBatch,
    SegmentationItem,
    collate_segmentation,
    list_segmentation,
)
from lightspine.data.segmentation.dataset import SegmentationDataset
from lightspine.data.segmentation.folders import (
    LabelledImage,
    SegmentationSplits,
    pair_labels,
    read_ade20k_classes,
    scan_segmentation_folder,
)
from lightspine.data.segmentation.label_maps import IGNORED, LabelReader, ReadsLabels
from lightspine.data.segmentation.painted import PaintedLabels
from lightspine.data.segmentation.photometric import PhotometricDistortion
from lightspine.data.segmentation.testing import SegmentationTest, slide_windows
from lightspine.data.segmentation.transforms import (
    MixedCrop,
    RandomRatioResize,
    create_segmentation_eval_transform,
    create_segmentation_transform,
)

__all__ = [
    "IGNORED",
    "LabelReader",
    "LabelledImage",
    "MixedCrop",
    "PaintedLabels",
    "PhotometricDistortion",
    "RandomRatioResize",
    "ReadsLabels",
    "SegmentationBatch",
    "SegmentationDataset",
    "SegmentationItem",
    "SegmentationSplits",
    "SegmentationTest",
    "collate_segmentation",
    "create_segmentation_eval_transform",
    "create_segmentation_transform",
    "list_segmentation",
    "pair_labels",
    "read_ade20k_classes",
    "scan_segmentation_folder",
    "slide_windows",
]
