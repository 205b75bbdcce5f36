"""Semantic segmentation datasets: images with label maps."""

from lightspine.data.segmentation.coco_semantic import CocoSemanticLabels
from lightspine.data.segmentation.dataset import (
    SegmentationBatch,
    SegmentationDataset,
    SegmentationItem,
    collate_segmentation,
    collate_segmentation_lists,
)
from lightspine.data.segmentation.folders import (
    LabeledImage,
    SegmentationSplits,
    check_label_values,
    pair_labels,
    read_ade20k_classes,
    scan_segmentation_folder,
)
from lightspine.data.segmentation.label_maps import IGNORED, LabelMapSource, LabelReader
from lightspine.data.segmentation.sliding_window import SlidingWindowInference, sliding_windows
from lightspine.data.segmentation.transforms import (
    PhotometricDistortion,
    RandomDiverseCrop,
    RandomRatioResize,
    create_segmentation_eval_transform,
    create_segmentation_transform,
)

__all__ = [
    "IGNORED",
    "CocoSemanticLabels",
    "LabelMapSource",
    "LabelReader",
    "LabeledImage",
    "PhotometricDistortion",
    "RandomDiverseCrop",
    "RandomRatioResize",
    "SegmentationBatch",
    "SegmentationDataset",
    "SegmentationItem",
    "SegmentationSplits",
    "SlidingWindowInference",
    "check_label_values",
    "collate_segmentation",
    "collate_segmentation_lists",
    "create_segmentation_eval_transform",
    "create_segmentation_transform",
    "pair_labels",
    "read_ade20k_classes",
    "scan_segmentation_folder",
    "sliding_windows",
]
