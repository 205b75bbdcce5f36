"""Images with boxes and masks from COCO files."""

from lightspine.data.detection.annotations import CocoAnnotations
from lightspine.data.detection.aspect_sampler import AspectRatioSampler
from lightspine.data.detection.batch import DetectionBatch, DetectionItem, Target, collate_detection
from lightspine.data.detection.coco_file import read_coco
from lightspine.data.detection.dataset import DetectionDataset, select_images, select_trained
from lightspine.data.detection.masks import decode_segmentation, encode_mask
from lightspine.data.detection.transforms import (
    DetectionAugmentation,
    LargeScaleJitter,
    RandomSizedCrop,
    ResizeShorterSide,
    create_detection_transform,
)

__all__ = [
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
    "collate_detection",
    "create_detection_transform",
    "decode_segmentation",
    "encode_mask",
    "read_coco",
    "select_images",
    "select_trained",
]
