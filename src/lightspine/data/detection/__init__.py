"""Object detection and instance segmentation datasets in the COCO format."""

from lightspine.data.detection.annotations import (
    CocoAnnotations,
    hold_out,
    select_for_training,
    select_images,
)
from lightspine.data.detection.coco_file import read_coco
from lightspine.data.detection.coco_paths import (
    TRAIN_COCO_SPLITS,
    VAL_COCO_SPLITS,
    coco_paths,
    find_coco,
    find_coco_split,
    find_train_split,
    is_coco,
    list_coco_splits,
)
from lightspine.data.detection.dataset import (
    DetectionBatch,
    DetectionDataset,
    DetectionItem,
    Target,
    collate_detection,
)
from lightspine.data.detection.masks import decode_segmentation, encode_mask
from lightspine.data.detection.transforms import (
    DetectionAugmentation,
    LargeScaleJitter,
    RandomSizedCrop,
    ResizeShorterSide,
    create_detection_transform,
)
from lightspine.data.samplers import AspectRatioSampler

__all__ = [
    "TRAIN_COCO_SPLITS",
    "VAL_COCO_SPLITS",
    "AspectRatioSampler",
    "CocoAnnotations",
    "DetectionAugmentation",
    "DetectionBatch",
    "DetectionDataset",
    "DetectionItem",
    "LargeScaleJitter",
    "RandomSizedCrop",
    "ResizeShorterSide",
    "Target",
    "coco_paths",
    "collate_detection",
    "create_detection_transform",
    "decode_segmentation",
    "encode_mask",
    "find_coco",
    "find_coco_split",
    "find_train_split",
    "hold_out",
    "is_coco",
    "list_coco_splits",
    "read_coco",
    "select_for_training",
    "select_images",
]
