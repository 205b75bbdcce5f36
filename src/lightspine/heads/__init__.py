"""Feature pyramids, detection heads and segmentation heads for any backbone."""

from lightspine.heads.detectors import build_detector as build_detector
from lightspine.heads.features import FeatureBackbone as FeatureBackbone
from lightspine.heads.fpn import FeaturePyramid as FeaturePyramid
from lightspine.heads.segmenters import build_segmenter as build_segmenter
from lightspine.heads.simple_fpn import RescaledMaps as RescaledMaps
from lightspine.heads.simple_fpn import SimpleFeaturePyramid as SimpleFeaturePyramid

__all__ = [
    "FeatureBackbone",
    "FeaturePyramid",
    "RescaledMaps",
    "SimpleFeaturePyramid",
    "build_detector",
    "build_segmenter",
]
