"""Networks for dense tasks over any backbone: pyramids, detectors and segmenters."""

from lightspine.heads.detectors import build_detector as build_detector
from lightspine.heads.features import FeatureBackbone as FeatureBackbone
from lightspine.heads.fpn import FeaturePyramid as FeaturePyramid
from lightspine.heads.plain_pyramid import RescaledMaps as RescaledMaps
from lightspine.heads.plain_pyramid import SimpleFeaturePyramid as SimpleFeaturePyramid
from lightspine.heads.segmenters import build_segmenter as build_segmenter

__all__ = [
    "FeatureBackbone",
    "FeaturePyramid",
    "RescaledMaps",
    "SimpleFeaturePyramid",
    "build_detector",
    "build_segmenter",
]
