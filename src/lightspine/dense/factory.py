"""Create, load and convert detectors and segmenters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lightspine.dense.checkpoint import (
    DenseNetwork,
    NetworkMetadata,
    check_network,
    load_pretrained,
    read_network_metadata,
    save_network,
)
from lightspine.dense.official import refuse_detectron2
from lightspine.errors import UsageError
from lightspine.heads import FeatureBackbone, build_detector, build_segmenter
from lightspine.heads.detectors import DetectorName
from lightspine.heads.features import MapNorm
from lightspine.heads.mask_rcnn import MaskRCNN
from lightspine.heads.retinanet import RetinaNet
from lightspine.heads.segmenters import Segmenter, SegmenterName
from lightspine.models.checkpoint import Checkpoint, Weights, read_checkpoint
from lightspine.models.dense_weights import DENSE_WEIGHTS
from lightspine.models.factory import create_model
from lightspine.models.loading import frozen_without_weights
from lightspine.models.metadata import RUN_KEY, check_arguments
from lightspine.models.registry import list_models

_BACKBONE_OPTIONS = ("model_args", "norm", "freeze_batch_norm")
_OFFICIAL_OPTIONS = (*_BACKBONE_OPTIONS, "channels", "auxiliary_weight")


def create_detector(
    head: DetectorName,
    model: str,
    num_classes: int | None = None,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    pretrained: str | bool = False,
    pretrained_backbone: bool = False,
    weights: Weights = "auto",
    model_args: dict[str, Any] | None = None,
    norm: MapNorm | None = None,
    freeze_batch_norm: bool | None = None,
    frozen_stages: int | None = None,
    **head_args: Any,
) -> RetinaNet | MaskRCNN:
    """Create a detector with any model of lightspine or timm as its backbone.

    Args:
        head: "retinanet", "mask_rcnn" or "cascade_mask_rcnn".
        model: name of the backbone model.
        num_classes: object classes, without background; default: those of a detector's checkpoint.
        checkpoint: initial weights: a classifier checkpoint of the model, or a detector with the same head
            and model (without its class-dependent layers if the number of classes differs): a file of
            `save_network`, or the published file of mmdetection.
        pretrained: "coco" loads the published weights of this head and model, which are downloaded at the
            first call; a name of `lightspine weights --all` chooses among several.
        pretrained_backbone: load the published weights of the classifier into the backbone.
        weights: entry of a classifier checkpoint: "model" (as trained; used for dense tasks by all five
            papers), "ema", or "auto" for the one whose score is published.
        model_args: further arguments of the model, such as `drop_path_rate`.
        norm: see `lightspine.heads.FeatureBackbone`, which also lists the published settings. Default: that
            of a detector's checkpoint, else "none".
        freeze_batch_norm: see `lightspine.heads.FeatureBackbone`. Default: that of a detector's checkpoint,
            else False.
        frozen_stages: see `lightspine.heads.FeatureBackbone`.
        **head_args: see `lightspine.heads.build_detector`: `channels`, `resize`, `resize_rounding`,
            `score_threshold`, `detections_per_image`, `anchor_scale`.

    Returns:
        A detector with torchvision's interface, see `lightspine.heads.build_detector`. Its `load_report`
        describes which tensors of the checkpoint were loaded.

    Raises:
        UsageError: an unknown name or argument, a value out of range, a file of another head or model.
        LightspineError: the checkpoint cannot be read or does not fit.

    Examples:
        >>> from lightspine.dense import create_detector
        >>> detector = create_detector("retinanet", "shvit_s1", num_classes=80, freeze_batch_norm=True)
    """
    if head not in get_args(DetectorName):
        raise UsageError(f"expected a detector among {', '.join(get_args(DetectorName))}, got {head!r}")
    checkpoint = _choose_checkpoint(head, model, checkpoint, pretrained, pretrained_backbone)
    opened = None if checkpoint is None else read_checkpoint(checkpoint)
    given = {"model_args": model_args, "norm": norm, "freeze_batch_norm": freeze_batch_norm, **head_args}
    # Saved always, because files without it were trained with "down".
    given.setdefault("resize_rounding", "nearest")
    num_classes, options = _complete_options(head, model, num_classes, given, opened)
    backbone = _create_backbone(model, opened, weights, options, frozen_stages)
    head_args = {name: value for name, value in options.items() if name not in _BACKBONE_OPTIONS}
    network = build_detector(head, backbone, num_classes, **head_args)
    return _initialize(network, head, model, num_classes, options, opened, weights)


def create_segmenter(
    head: SegmenterName,
    model: str,
    num_classes: int | None = None,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    pretrained: str | bool = False,
    pretrained_backbone: bool = False,
    weights: Weights = "auto",
    model_args: dict[str, Any] | None = None,
    norm: MapNorm | None = None,
    freeze_batch_norm: bool | None = None,
    frozen_stages: int | None = None,
    **head_args: Any,
) -> Segmenter:
    """Create a segmenter with any model of lightspine or timm as its backbone.

    Args:
        head: "semantic_fpn" or "upernet".
        model: see `create_detector`.
        num_classes: number of classes; default: those of a segmenter's checkpoint.
        checkpoint: see `create_detector`; the published segmenters are files of mmsegmentation.
        pretrained: see `create_detector`; the data set of segmenters is "ade20k".
        pretrained_backbone: see `create_detector`.
        weights: see `create_detector`.
        model_args: see `create_detector`.
        norm: see `create_detector`.
        freeze_batch_norm: see `create_detector`.
        frozen_stages: see `create_detector`.
        **head_args: see `lightspine.heads.build_segmenter`: `channels`, `dropout`, `auxiliary_weight`,
            `ignore_index`.

    Returns:
        The segmenter: normalized images (B, C, H, W) to logits (B, num_classes, H, W).

    Raises:
        UsageError: see `create_detector`.
        LightspineError: see `create_detector`.

    Examples:
        >>> from lightspine.dense import create_segmenter
        >>> segmenter = create_segmenter("semantic_fpn", "shvit_s1", num_classes=150)
    """
    if head not in get_args(SegmenterName):
        raise UsageError(f"expected a segmenter among {', '.join(get_args(SegmenterName))}, got {head!r}")
    checkpoint = _choose_checkpoint(head, model, checkpoint, pretrained, pretrained_backbone)
    opened = None if checkpoint is None else read_checkpoint(checkpoint)
    given = {"model_args": model_args, "norm": norm, "freeze_batch_norm": freeze_batch_norm, **head_args}
    num_classes, options = _complete_options(head, model, num_classes, given, opened)
    backbone = _create_backbone(model, opened, weights, options, frozen_stages)
    head_args = {name: value for name, value in options.items() if name not in _BACKBONE_OPTIONS}
    network = build_segmenter(head, backbone, num_classes, **head_args)
    return _initialize(network, head, model, num_classes, options, opened, weights)


def _choose_checkpoint(
    head: str,
    model: str,
    checkpoint: str | Path | Checkpoint | None,
    pretrained: str | bool,
    pretrained_backbone: bool,
) -> str | Path | Checkpoint | None:
    """Return the checkpoint that is given, or the name of the published weights that are asked for.

    Raises:
        UsageError: more than one is asked for, or there are no such weights.
    """
    if (checkpoint is not None) + bool(pretrained) + pretrained_backbone > 1:
        raise UsageError("expected one of checkpoint, pretrained and pretrained_backbone, received several")
    if pretrained_backbone:
        names = list_models(model, pretrained=True)
        if not names:
            raise UsageError(f"no weights of {model} can be downloaded: pass a checkpoint")
        return names[0]
    if not pretrained:
        return checkpoint
    known = [weights for weights in DENSE_WEIGHTS.values() if (weights.head, weights.model) == (head, model)]
    for weights in known:
        if pretrained in (True, weights.dataset, weights.name, weights.tag):
            return weights.name
    expected = ", ".join(name for weights in known for name in (weights.dataset, weights.name))
    raise UsageError(
        f"no published weights {pretrained!r} of {head} over {model}: "
        f"expected {expected or 'a checkpoint file'}"
    )


def load_network(
    source: str | Path | Checkpoint, *, weights: Weights = "auto", **head_args: Any
) -> tuple[DenseNetwork, NetworkMetadata]:
    """Load a detector or segmenter from its file.

    The file is one of `save_network`, a training checkpoint (`.ckpt`), or a published checkpoint of
    mmdetection or mmsegmentation, whose network is recognized by its tensors.

    Args:
        source: the file, or an opened checkpoint.
        weights: "model" (as trained), "ema" (their average), or "auto" for the ones that the run validated.
        **head_args: arguments of the head that replace those in the file, such as `score_threshold`.

    Returns:
        The network in evaluation mode, and its metadata.

    Raises:
        UsageError: the file does not exist, holds no detector or segmenter, or has no such weights.
        LightspineError: the file cannot be read or does not fit.
    """
    checkpoint = read_checkpoint(source)
    metadata = read_network_metadata(checkpoint)
    create: Any = create_detector if metadata.kind == "detector" else create_segmenter

    def build(arguments: dict[str, Any]) -> Any:
        return create(metadata.head, metadata.model, **arguments)

    stored = check_arguments(checkpoint, {"num_classes": metadata.num_classes, **metadata.options}, build)
    stored.pop("num_classes")
    metadata = replace(metadata, options=stored | head_args)
    network: DenseNetwork = create(metadata.head, metadata.model, metadata.num_classes, **metadata.options)
    network.load_report = load_pretrained(network, checkpoint, weights=weights)
    return network.eval(), metadata


def convert_network(
    source: str | Path | Checkpoint, target: str | Path, *, weights: Weights = "auto"
) -> DenseNetwork:
    """Convert a detector's or segmenter's checkpoint, such as one of OpenMMLab, to a lightspine file.

    Args:
        source: the file, or an opened checkpoint.
        target: .safetensors file to write.
        weights: see `load_network`.

    Returns:
        The network that was written; `network.load_report` describes what was converted.

    Raises:
        UsageError: see `load_network`; the target does not end in .safetensors.
        LightspineError: see `load_network`; the target cannot be written.
    """
    network, about = load_network(source, weights=weights)
    save_network(
        network,
        target,
        class_names=about.class_names,
        preprocessing=about.preprocessing,
        settings=about.settings,
        metadata=about.metadata | ({RUN_KEY: json.dumps(about.run)} if about.run else {}),
    )
    return network


def feature_backbone(network: DenseNetwork) -> FeatureBackbone:
    """Return the backbone of a detector or segmenter."""
    inner: Any = network.backbone
    return inner if isinstance(inner, FeatureBackbone) else inner.backbone


def _complete_options(
    head: str,
    model: str,
    num_classes: int | None,
    given: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> tuple[int, dict[str, Any]]:
    """Return the number of classes and the arguments that `save_network` saves.

    What is not given is taken from a detector's or segmenter's checkpoint.
    """
    # None is a value of other options: `resize=None` keeps the size of the images.
    options = {name: v for name, v in given.items() if v is not None or name not in _OFFICIAL_OPTIONS}
    if checkpoint is not None and not checkpoint.is_dense:
        refuse_detectron2(checkpoint)
    if checkpoint is not None and checkpoint.is_dense:
        metadata = read_network_metadata(checkpoint, model=model)
        check_network(checkpoint, metadata, head, model)
        num_classes = metadata.num_classes if num_classes is None else num_classes
        taken = _OFFICIAL_OPTIONS if checkpoint.is_openmmlab else _BACKBONE_OPTIONS[1:]
        options = {name: metadata.options[name] for name in taken if name in metadata.options} | options
    if num_classes is None:
        raise UsageError(f"expected num_classes for {head} over {model}, or a checkpoint of it")
    return num_classes, {"model_args": {}, "norm": "none", "freeze_batch_norm": False} | options


def _create_backbone(
    model: str,
    checkpoint: Checkpoint | None,
    weights: Weights,
    options: dict[str, Any],
    frozen_stages: int | None,
) -> FeatureBackbone:
    arguments = options["model_args"]
    for name in ("features_only", "num_classes", "checkpoint", "weights"):
        if name in arguments:
            raise UsageError(f"expected model_args without {name}, which the head determines")
    if frozen_stages is not None and checkpoint is None and not arguments.get("pretrained"):
        raise frozen_without_weights(model)
    classifier = None if checkpoint is None or checkpoint.is_dense else checkpoint
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


def _initialize(
    network: Any,
    head: str,
    model: str,
    num_classes: int,
    options: dict[str, Any],
    checkpoint: Checkpoint | None,
    weights: Weights,
) -> Any:
    """Record the arguments that `save_network` needs, and load a detector's or segmenter's checkpoint."""
    network.init_args = {
        "name": f"{head} over {model}",
        "head": head,
        "model": model,
        "num_classes": num_classes,
        "options": options,
    }
    if checkpoint is not None and checkpoint.is_dense:
        network.load_report = load_pretrained(network, checkpoint, weights=weights)
    elif checkpoint is not None:
        network.load_report = feature_backbone(network).load_report
    return network
