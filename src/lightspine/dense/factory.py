"""Create and load detectors and segmenters."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lightspine.dense.checkpoint import (
    DenseNetwork,
    NetworkMetadata,
    is_network_file,
    load_pretrained,
    read_network_metadata,
)
from lightspine.errors import UsageError
from lightspine.heads import FeatureBackbone, build_detector, build_segmenter
from lightspine.heads.detectors import DetectorName
from lightspine.heads.features import MapNorm
from lightspine.heads.mask_rcnn import MaskRCNN
from lightspine.heads.retinanet import RetinaNet
from lightspine.heads.segmenters import Segmenter, SegmenterName
from lightspine.models.checkpoint import Weights
from lightspine.models.factory import create_model


def create_detector(
    head: DetectorName,
    model: str,
    num_classes: int,
    *,
    checkpoint: str | Path | None = None,
    weights: Weights = "auto",
    model_args: dict[str, Any] | None = None,
    norm: MapNorm = "none",
    freeze_batch_norm: bool = False,
    frozen_stages: int | None = None,
    **head_args: Any,
) -> RetinaNet | MaskRCNN:
    """Create a detector over any model of lightspine or timm.

    Args:
        head: "retinanet", "mask_rcnn" or "cascade_mask_rcnn".
        model: name of the model that gives the maps.
        num_classes: classes of objects, background not counted.
        checkpoint: weights to start from: those of the model's classifier, or a file of `save_network` with
            the same head and model. Of the latter, the layers that depend on the number of classes are made
            anew where that differs.
        weights: which entry of a classifier's file: "model" (as trained, what all five papers' dense tasks
            start from), "ema", or "auto" for the one whose score is published.
        model_args: further arguments of the model, such as `drop_path_rate`.
        norm: see `lightspine.heads.FeatureBackbone`, also for what the papers set.
        freeze_batch_norm: likewise.
        frozen_stages: likewise.
        **head_args: see `lightspine.heads.build_detector`: `channels`, `resize`, `score_threshold`,
            `detections_per_image`, `anchor_scale`.

    Returns:
        torchvision's detector: see `lightspine.heads.build_detector` for what it takes and gives.
        `load_report` tells what became of the checkpoint's tensors.

    Raises:
        UsageError: an unknown name or argument, a value out of its range, a file of another head or model.
        LightspineError: the checkpoint cannot be read or does not fit.

    Examples:
        >>> from lightspine.dense import create_detector
        >>> detector = create_detector("retinanet", "shvit_s1", num_classes=80, freeze_batch_norm=True)
    """
    if head not in get_args(DetectorName):
        raise UsageError(f"expected a detector among {', '.join(get_args(DetectorName))}, got {head!r}")
    options = {
        "model_args": model_args or {},
        "norm": norm,
        "freeze_batch_norm": freeze_batch_norm,
        **head_args,
    }
    backbone = _backbone(model, checkpoint, weights, options, frozen_stages)
    network = build_detector(head, backbone, num_classes, **head_args)
    return _finish(network, head, model, num_classes, options, checkpoint)


def create_segmenter(
    head: SegmenterName,
    model: str,
    num_classes: int,
    *,
    checkpoint: str | Path | None = None,
    weights: Weights = "auto",
    model_args: dict[str, Any] | None = None,
    norm: MapNorm = "none",
    freeze_batch_norm: bool = False,
    frozen_stages: int | None = None,
    **head_args: Any,
) -> Segmenter:
    """Create a segmenter over any model of lightspine or timm.

    Args:
        head: "semantic_fpn" or "upernet".
        model: as in `create_detector`, with all that follows.
        num_classes: classes of pixels.
        checkpoint: likewise.
        weights: likewise.
        model_args: likewise.
        norm: likewise.
        freeze_batch_norm: likewise.
        frozen_stages: likewise.
        **head_args: see `lightspine.heads.build_segmenter`: `channels`, `dropout`, `auxiliary_weight`,
            `ignore_index`.

    Returns:
        The segmenter: normalised images (B, C, H, W) in, logits (B, num_classes, H, W) out.

    Raises:
        UsageError: as `create_detector`.
        LightspineError: as `create_detector`.

    Examples:
        >>> from lightspine.dense import create_segmenter
        >>> segmenter = create_segmenter("semantic_fpn", "shvit_s1", num_classes=150)
    """
    if head not in get_args(SegmenterName):
        raise UsageError(f"expected a segmenter among {', '.join(get_args(SegmenterName))}, got {head!r}")
    options = {
        "model_args": model_args or {},
        "norm": norm,
        "freeze_batch_norm": freeze_batch_norm,
        **head_args,
    }
    backbone = _backbone(model, checkpoint, weights, options, frozen_stages)
    network = build_segmenter(head, backbone, num_classes, **head_args)
    return _finish(network, head, model, num_classes, options, checkpoint)


def load_network(path: str | Path, **head_args: Any) -> tuple[DenseNetwork, NetworkMetadata]:
    """Build the detector or segmenter of a file that `save_network` wrote.

    Args:
        path: the file.
        **head_args: arguments of the head that take the place of those in the file, such as
            `score_threshold`.

    Returns:
        The network in evaluation mode, and what is known about it.

    Raises:
        UsageError: no such file, or one of a classifier.
        LightspineError: the file cannot be read or does not fit.
    """
    saved = read_network_metadata(path)
    saved = replace(saved, options=saved.options | head_args)
    create: Any = create_detector if saved.kind == "detector" else create_segmenter
    network: DenseNetwork = create(saved.head, saved.model, saved.num_classes, **saved.options)
    network.load_report = load_pretrained(network, path)
    return network.eval(), saved


def feature_backbone(network: DenseNetwork) -> FeatureBackbone:
    """Return the part of a detector or segmenter that gives the maps."""
    inner: Any = network.backbone
    return inner if isinstance(inner, FeatureBackbone) else inner.backbone


def _backbone(
    model: str,
    checkpoint: str | Path | None,
    weights: Weights,
    options: dict[str, Any],
    frozen_stages: int | None,
) -> FeatureBackbone:
    arguments = options["model_args"]
    for name in ("features_only", "num_classes", "checkpoint", "weights"):
        if name in arguments:
            raise UsageError(f"expected model_args without {name}, which the head determines")
    classifier = None if checkpoint is None or is_network_file(checkpoint) else checkpoint
    if frozen_stages is not None and checkpoint is None and not arguments.get("pretrained"):
        raise UsageError(f"frozen stages of {model} would keep random weights: give a checkpoint")
    try:
        maps = create_model(model, checkpoint=classifier, weights=weights, features_only=True, **arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UsageError(f"wrong arguments of the model {model}: {error}") from error
    return FeatureBackbone(
        maps,
        norm=options["norm"],
        frozen_stages=frozen_stages,
        freeze_batch_norm=options["freeze_batch_norm"],
    )


def _finish(
    network: Any,
    head: str,
    model: str,
    num_classes: int,
    options: dict[str, Any],
    checkpoint: str | Path | None,
) -> Any:
    """Note how the network was made, for its file, and load a file of such a network."""
    network.init_args = {
        "name": f"{head} over {model}",
        "head": head,
        "model": model,
        "num_classes": num_classes,
        "options": options,
    }
    if checkpoint is not None and is_network_file(checkpoint):
        network.load_report = load_pretrained(network, checkpoint)
    elif checkpoint is not None:
        network.load_report = feature_backbone(network).load_report
    return network
