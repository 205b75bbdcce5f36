"""Checkpoints of small detectors and segmenters with random weights."""

from pathlib import Path
from typing import Any

import torch

from lightspine.dense import create_detector, create_segmenter, save_network
from support.dense import few_proposals

SMALL_MODEL = "test_efficientnet"
SMALL_MAPS = {"out_indices": (1, 2, 3, 4)}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def detector_file(path: Path, class_names: list[str], head: Any = "retinanet", **options: Any) -> Path:
    """Write the checkpoint of a detector that detects objects in any image."""
    torch.manual_seed(0)
    network = create_detector(
        head,
        SMALL_MODEL,
        len(class_names),
        model_args=SMALL_MAPS,
        **{"channels": 16, "resize": (64, 96), "score_threshold": 0.0, "detections_per_image": 5} | options,
    )
    return save_network(few_proposals(network), path, class_names=class_names)  # type: ignore[arg-type]


def segmenter_file(path: Path, class_names: list[str], **settings: Any) -> Path:
    """Write the checkpoint of a segmenter that predicts every class somewhere."""
    torch.manual_seed(0)
    network = create_segmenter(
        "semantic_fpn", SMALL_MODEL, len(class_names), model_args=SMALL_MAPS, channels=16
    )
    known = {"scale": [96, 64], "divisor": 1} | settings
    return save_network(network, path, class_names=class_names, preprocessing=PREPROCESSING, settings=known)
