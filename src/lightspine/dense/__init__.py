"""Detectors and segmenters: creation, checkpoints and metrics."""

from lightspine.dense.checkpoint import DenseNetwork as DenseNetwork
from lightspine.dense.checkpoint import NetworkMetadata as NetworkMetadata
from lightspine.dense.checkpoint import save_network as save_network
from lightspine.dense.factory import convert_network as convert_network
from lightspine.dense.factory import create_detector as create_detector
from lightspine.dense.factory import create_segmenter as create_segmenter
from lightspine.dense.factory import feature_backbone as feature_backbone
from lightspine.dense.factory import load_network as load_network

__all__ = [
    "DenseNetwork",
    "NetworkMetadata",
    "convert_network",
    "create_detector",
    "create_segmenter",
    "feature_backbone",
    "load_network",
    "save_network",
]
