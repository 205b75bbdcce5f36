"""Detectors and segmenters by the names of their head and model, and files of them."""

from lightspine.dense.networks import DenseNetwork as DenseNetwork
from lightspine.dense.networks import create_detector as create_detector
from lightspine.dense.networks import create_segmenter as create_segmenter
from lightspine.dense.networks import feature_backbone as feature_backbone
from lightspine.dense.saving import SavedNetwork as SavedNetwork
from lightspine.dense.saving import load_network as load_network
from lightspine.dense.saving import save_network as save_network

__all__ = [
    "DenseNetwork",
    "SavedNetwork",
    "create_detector",
    "create_segmenter",
    "feature_backbone",
    "load_network",
    "save_network",
]
