"""OpenMMLab checkpoints of the published detectors and segmenters: recognition and conversion.

The papers trained their detectors with mmdetection and their segmenters with mmsegmentation, 0.x to 3.x. The
layouts of those versions are the same. A file holds no description of its network: head, backbone, number of
classes and norms are read from the names and shapes of its tensors.

Conversion changes more than names:

- Box heads of mmdetection have the background last and no box offsets or masks for it; here the background is
  class 0, so class rows are rotated and groups of zeros are put in front.
- Convolutions of finer pyramid levels are numbered from the finest level; here from the coarsest.
- EfficientViM's LayerNorm parameters have the shape (1, C, 1, 1); here (C,).
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightspine.data.published_classes import ade20k_class_names, coco_class_names
from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import OPENMMLAB_CLASSES_KEY, Checkpoint, Weights, read_checkpoint
from lightspine.models.factory import create_model
from lightspine.models.loading import (
    LoadReport,
    build_on_meta,
    identify_tensors,
    shape_errors,
    shapes_of,
)
from lightspine.models.registry import find_record, get_record, list_models

_RETINANET_ANCHORS = 9
_RESCALES = re.compile(r"^fpn[12]\.")
# Vim's segmenters have a norm after the last layer that no feature map passes through.
_UNUSED = ("norm_f.weight", "norm_f.bias")


@dataclass(frozen=True, kw_only=True)
class OfficialNetwork:
    """Network in an OpenMMLab checkpoint.

    Attributes:
        kind: "detector" or "segmenter".
        head: see `create_detector` and `create_segmenter`.
        model: name of the backbone model.
        num_classes: number of classes, without background.
        options: arguments of `create_detector` or `create_segmenter` that the tensors determine.
        class_names: names in the file, else those of COCO for 80 and of ADE20K for 150 classes; `None` if
            unknown.
        settings: inference settings of the published test, see `NetworkMetadata`.
    """

    kind: Literal["detector", "segmenter"]
    head: str
    model: str
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Head, backbone and number of classes."""
        return f"{self.head} over {self.model} with {self.num_classes} classes"


def describe_official(checkpoint: Checkpoint, model: str | None = None) -> OfficialNetwork:
    """Recognize the network of an OpenMMLab checkpoint by its tensors.

    Args:
        checkpoint: an opened file with `checkpoint.is_openmmlab`.
        model: expected backbone; decides between models whose backbones are equal, such as `shvit_s4` and
            `shvit_s4_dist`.

    Raises:
        LightspineError: the head or the backbone is none of this library's, or their tensors do not fit.
    """
    with shape_errors(f"{checkpoint.label} fits no detector or segmenter"):
        return _recognize(checkpoint, model)


def _recognize(checkpoint: Checkpoint, model: str | None) -> OfficialNetwork:
    tensors = checkpoint.entries[checkpoint.select("auto")]
    kind, head, num_classes = _recognize_head(checkpoint.label, tensors)
    name, model_args = _recognize_backbone(checkpoint.label, head, _backbone_tensors(tensors), model)
    normed = any(re.match(r"backbone\.outnorm\d|neck\.batch_norm\.", key) for key in tensors)
    options: dict[str, Any] = {
        "model_args": model_args,
        "norm": "layer" if normed else "none",
        # SHViT and EfficientViM are trained with frozen BatchNorm statistics.
        "freeze_batch_norm": get_record(name).family in ("shvit", "efficientvim"),
    }
    settings: dict[str, Any] = {}
    if kind == "segmenter":
        options |= {"channels": tensors["decode_head.conv_seg.weight"].shape[1]}
        settings = {"scale": [512, 2048]}
        if head == "upernet" and not any(key.startswith("auxiliary_head.") for key in tensors):
            options["auxiliary_weight"] = 0.0
        if head == "semantic_fpn":
            settings |= {"divisor": 32, "resize_twice": True}
        if get_record(name).family == "vim":
            settings |= {"window": [512, 512], "stride": [341, 341]}
    return OfficialNetwork(
        kind=kind,
        head=head,
        model=name,
        num_classes=num_classes,
        options=options,
        class_names=_class_names(checkpoint, kind, num_classes),
        settings=settings,
    )


def load_official(network: Any, source: str | Path | Checkpoint, *, weights: Weights = "auto") -> LoadReport:
    """Load an OpenMMLab checkpoint into a detector or segmenter with the same head and backbone model.

    If the numbers of classes differ, the layers that depend on them keep their initial values and the report
    lists them as dropped.

    Args:
        network: from `create_detector` or `create_segmenter`.
        source: an OpenMMLab checkpoint, or an opened one.
        weights: entry of the file; OpenMMLab's have "model" only.

    Raises:
        UsageError: the file holds another head or backbone model, or has no such weights.
        LightspineError: the file cannot be read, or tensors are missing, unknown or of another shape; the
            network is then unchanged.
    """
    checkpoint = read_checkpoint(source)
    init_args = network.init_args
    entry = checkpoint.select(weights)
    tensors = checkpoint.entries[entry]
    found = describe_official(checkpoint, init_args["model"])
    if (found.head, found.model) != (init_args["head"], init_args["model"]):
        raise UsageError(
            f"{checkpoint.label} is an OpenMMLab checkpoint of {found}, expected {init_args['name']}"
        )
    expected = network.state_dict()
    with shape_errors(f"{checkpoint.label} does not fit {init_args['name']}"):
        converted, sources = _convert(tensors, network)
    report = LoadReport(source=checkpoint.label, entry=entry, is_ema=False)
    same_classes = found.num_classes == init_args["num_classes"]
    fitting: dict[str, Tensor] = {}
    for name, tensor in converted.items():
        if tensor.shape == expected[name].shape:
            fitting[name] = tensor
            report.converted[name] = f"from {sources[name]}"
        elif differs_by_classes(tensor, expected[name], found.num_classes, init_args["num_classes"]):
            report.dropped.append(name)
        else:
            report.mismatched[sources[name]] = tuple(tensor.shape), tuple(expected[name].shape)
    used = set(sources.values())
    report.unexpected = [key for key in tensors if key not in used and not _is_unused(key, network)]
    absent = [name for name in expected if name not in converted]
    report.missing = [*report.dropped, *absent]
    if absent or not report.complete:
        report.missing = [_published_name(name, network) or name for name in absent]
        raise LightspineError(
            f"{checkpoint.label} is an OpenMMLab checkpoint of {found}, but does not fit: "
            f"{report.mismatches()}"
        )
    report.dropped += [key for key in tensors if key not in used]
    report.dropped_head = not same_classes
    report.loaded = list(fitting)
    network.load_state_dict(fitting, strict=False)
    return report


def differs_by_classes(found: Tensor, expected: Tensor, in_file: int, in_network: int) -> bool:
    """Return whether the shapes of two weights or biases differ by the numbers of classes alone.

    The first dimension of a class layer is a multiple of the number of classes, with or without the
    background.

    Args:
        found: tensor of a file.
        expected: tensor of the network.
        in_file: number of classes of the file.
        in_network: number of classes of the network.
    """
    if in_file == in_network or found.ndim != expected.ndim or found.shape[1:] != expected.shape[1:]:
        return False
    return any(
        len(found) * (in_network + background) == len(expected) * (in_file + background)
        for background in (0, 1)
    )


def refuse_detectron2(checkpoint: Checkpoint) -> None:
    """Raise UsageError if a file holds a detector of detectron2, such as Vim's Cascade Mask R-CNN."""
    for tensors in checkpoint.entries.values():
        if any(key.startswith("proposal_generator.") for key in tensors):
            raise UsageError(
                f"{checkpoint.label} holds a detector of detectron2, whose files are not read: expected a "
                f"classifier's file, or a detector's of lightspine or mmdetection"
            )


def _recognize_head(
    label: str, tensors: Mapping[str, Tensor]
) -> tuple[Literal["detector", "segmenter"], str, int]:
    """Return the kind and name of the head, and the number of classes."""

    def rows(key: str) -> int:
        return tensors[key].shape[0]

    if {"rpn_head.rpn_cls.weight", "roi_head.bbox_head.fc_cls.weight"} <= tensors.keys() and any(
        key.startswith("roi_head.mask_head.") for key in tensors
    ):
        return "detector", "mask_rcnn", rows("roi_head.bbox_head.fc_cls.weight") - 1
    if "bbox_head.retina_cls.weight" in tensors:
        return "detector", "retinanet", rows("bbox_head.retina_cls.weight") // _RETINANET_ANCHORS
    if "decode_head.conv_seg.weight" in tensors:
        for head, part in (("upernet", "psp_modules"), ("semantic_fpn", "scale_heads")):
            if any(key.startswith(f"decode_head.{part}.") for key in tensors):
                return "segmenter", head, rows("decode_head.conv_seg.weight")
    names = [key for key in tensors if not key.startswith(("backbone.", "neck."))]
    raise LightspineError(
        f"{label} is an OpenMMLab checkpoint of another head, expected RetinaNet, Mask R-CNN, UPerNet or "
        f"Semantic FPN: it has {', '.join(names[:3])}"
    )


def _backbone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the backbone model, without map norms and rescaling layers."""
    inner = {key.removeprefix("backbone."): t for key, t in tensors.items() if key.startswith("backbone.")}
    return {
        key: tensor
        for key, tensor in inner.items()
        if not key.startswith("outnorm") and not _RESCALES.match(key) and key not in _UNUSED
    }


def _recognize_backbone(
    label: str, head: str, tensors: dict[str, Tensor], expected: str | None
) -> tuple[str, dict[str, Any]]:
    """Return the registered name of the backbone and the arguments of the model."""
    shapes = shapes_of(tensors)
    if expected is not None and find_record(expected) is not None:
        model_args = _model_args(expected, head, shapes)
        if _fits(expected, shapes, model_args):
            return expected, model_args
    guess = identify_tensors(shapes) if shapes else None
    if guess is None:
        raise LightspineError(
            f"{label} is an OpenMMLab checkpoint of {head} over a backbone that fits no registered model, "
            f"expected {expected or 'one of lightspine.list_models()'}: it has "
            f"{', '.join(f'backbone.{key}' for key in list(tensors)[:3])}"
        )
    if guess.family != "vim":
        return guess.name, {}
    # The variants of one width differ in the stride, which the tensors do not show.
    width = shapes["norm_f.weight" if "norm_f.weight" in shapes else "patch_embed.proj.bias"].shape
    names = [name for name in list_models() if get_record(name).family == "vim"]
    fitting = [n for n in names if build_on_meta(n).state_dict()["stem.bias"].shape == width]
    sized = {n: _model_args(n, head, shapes) for n in fitting}
    best = min(sized, key=lambda n: abs(sized[n].get("img_size", 224) - 512))
    return best, sized[best]


def _model_args(name: str, head: str, shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the model that the tensors of its backbone determine."""
    if get_record(name).family != "vim":
        return {}
    model: Any = build_on_meta(name)
    args: dict[str, Any] = {} if "cls_token" in shapes else {"class_token": "none"}
    if "pos_embed" in shapes:
        side = round((shapes["pos_embed"].shape[1] - ("cls_token" in shapes)) ** 0.5)
        args["img_size"] = (side - 1) * model.stride + model.patch_size
    if head == "upernet" and name.startswith("vim_tiny"):
        args["feature_source"] = "mixer"
    return args


def _fits(name: str, shapes: dict[str, Tensor], model_args: dict[str, Any]) -> bool:
    expected = _feature_shapes(name, json.dumps(model_args))
    fitted = get_record(name).checkpoint_filter_fn(dict(shapes), _feature_model(name, json.dumps(model_args)))
    return {key: t.shape for key, t in fitted.items()} == expected


@cache
def _feature_model(name: str, model_args: str) -> Any:
    with torch.device("meta"):
        wrapper: Any = create_model(name, features_only=True, **json.loads(model_args))
    return getattr(wrapper, "model", wrapper)


def _feature_shapes(name: str, model_args: str) -> dict[str, torch.Size]:
    return {key: t.shape for key, t in _feature_model(name, model_args).state_dict().items()}


def _class_names(checkpoint: Checkpoint, kind: str, num_classes: int) -> list[str] | None:
    """Return the names in the file, with ADE20K's as the data set spells them; else the published names."""
    published = {"detector": coco_class_names(), "segmenter": ade20k_class_names()}[kind]
    text = checkpoint.metadata.get(OPENMMLAB_CLASSES_KEY)
    names = [name.strip() for name in json.loads(text)] if text else published
    return names if len(names) == num_classes else None


def _convert(tensors: Mapping[str, Tensor], network: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Convert the tensors to the network's names; also return the published name of each."""
    prefix, model = _wrapped_model(network)
    backbone = _backbone_tensors(tensors)
    keys = {id(tensor): f"backbone.{key}" for key, tensor in backbone.items()}
    storages = {t.untyped_storage().data_ptr(): f"backbone.{key}" for key, t in backbone.items() if t.numel()}
    fitted = get_record(network.init_args["model"]).checkpoint_filter_fn(dict(backbone), model)
    inner = model.state_dict()
    converted: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, tensor in fitted.items():
        origin = keys.get(id(tensor)) or storages.get(tensor.untyped_storage().data_ptr())
        if name in inner and origin is not None:
            converted[prefix + name], sources[prefix + name] = tensor, origin
    for name, expected in network.state_dict().items():
        published = None if name.startswith(prefix) else _published_name(name, network)
        if published is not None and published in tensors:
            converted[name] = _convert_tensor(name, tensors[published], expected)
            sources[name] = published
    return converted, sources


def _wrapped_model(network: Any) -> tuple[str, Any]:
    """Return the backbone model of a network and the prefix of its tensors' names."""
    for prefix in ("backbone.backbone.model.model.", "backbone.model.model."):
        try:
            return prefix, network.get_submodule(prefix.rstrip("."))
        except AttributeError:
            continue
    raise LightspineError(f"{network.init_args['model']} has no OpenMMLab checkpoints")


def _convert_tensor(name: str, tensor: Tensor, expected: Tensor) -> Tensor:
    if name.startswith("roi_heads.box_predictor.0.cls_score."):
        return tensor.roll(1, dims=0)
    if name.startswith("roi_heads.box_predictor.0.bbox_pred."):
        return torch.cat([torch.zeros_like(tensor[:4]), tensor])
    if name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
        return torch.cat([torch.zeros_like(tensor[:1]), tensor])
    if ".norms." in name and tensor.ndim > expected.ndim and tensor.numel() == expected.numel():
        return tensor.reshape(expected.shape)
    return tensor


_Rename = tuple[re.Pattern[str], str | Callable[[re.Match[str], Any], str]]


def _compile(rules: Iterable[tuple[str, str | Callable[[re.Match[str], Any], str]]]) -> tuple[_Rename, ...]:
    return tuple((re.compile(f"^{pattern}$"), name) for pattern, name in rules)


def _finer_conv(match: re.Match[str], network: Any) -> str:
    """Name the output convolution of a finer level: published from the finest level, here the coarsest."""
    count = len(network.backbone.pyramid.finer_smooths)
    return f"neck.extra_fpn_convs.{count - 1 - int(match[1])}.conv.{match[2]}"


def _coarser_conv(match: re.Match[str], network: Any) -> str:
    count = len(network.backbone.pyramid.laterals)
    return f"neck.fpn_convs.{count + int(match[1])}.conv.{match[2]}"


def _map_norm(match: re.Match[str], network: Any) -> str:
    """Name a map norm: part of VMamba's backbone, of EfficientViM's pyramid."""
    if get_record(network.init_args["model"]).family == "vmamba":
        return f"backbone.outnorm{match[1]}.{match[2]}"
    return f"neck.batch_norm.{match[1]}.{match[2]}"


def _conv_norm(match: re.Match[str], published: str) -> str:
    """Name a tensor of convolution and BatchNorm, which are numbered 0 and 1 here."""
    return f"{published}.{('conv', 'bn')[int(match['part'])]}.{match['leaf']}"


_PART = r"(?P<part>[01])\.(?P<leaf>\w+)"
_RENAMES = _compile(
    (
        (r"backbone\.(?:backbone\.)?norms\.(\d+)\.(\w+)", _map_norm),
        (r"(?:backbone|decoder)\.pyramid\.laterals\.(\d+)\.(\w+)", r"neck.lateral_convs.\1.conv.\2"),
        (r"(?:backbone|decoder)\.pyramid\.smooths\.(\d+)\.(\w+)", r"neck.fpn_convs.\1.conv.\2"),
        (r"backbone\.pyramid\.coarser_convs\.(\d+)\.(\w+)", _coarser_conv),
        (r"backbone\.pyramid\.finer_ups\.(\d+)\.(\w+)", r"neck.extra_trans_convs.\1.conv.\2"),
        (r"backbone\.pyramid\.finer_smooths\.(\d+)\.(\w+)", _finer_conv),
        (r"rpn\.head\.conv\.0\.0\.(\w+)", r"rpn_head.rpn_conv.\1"),
        (r"rpn\.head\.cls_logits\.(\w+)", r"rpn_head.rpn_cls.\1"),
        (r"rpn\.head\.bbox_pred\.(\w+)", r"rpn_head.rpn_reg.\1"),
        (r"roi_heads\.box_head\.0\.fc6\.(\w+)", r"roi_head.bbox_head.shared_fcs.0.\1"),
        (r"roi_heads\.box_head\.0\.fc7\.(\w+)", r"roi_head.bbox_head.shared_fcs.1.\1"),
        (r"roi_heads\.box_predictor\.0\.cls_score\.(\w+)", r"roi_head.bbox_head.fc_cls.\1"),
        (r"roi_heads\.box_predictor\.0\.bbox_pred\.(\w+)", r"roi_head.bbox_head.fc_reg.\1"),
        (r"roi_heads\.mask_head\.(\d+)\.0\.(\w+)", r"roi_head.mask_head.convs.\1.conv.\2"),
        (r"roi_heads\.mask_predictor\.conv5_mask\.(\w+)", r"roi_head.mask_head.upsample.\1"),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(\w+)", r"roi_head.mask_head.conv_logits.\1"),
        (r"head\.classification_head\.conv\.(\d+)\.0\.(\w+)", r"bbox_head.cls_convs.\1.conv.\2"),
        (r"head\.classification_head\.cls_logits\.(\w+)", r"bbox_head.retina_cls.\1"),
        (r"head\.regression_head\.conv\.(\d+)\.0\.(\w+)", r"bbox_head.reg_convs.\1.conv.\2"),
        (r"head\.regression_head\.bbox_reg\.(\w+)", r"bbox_head.retina_reg.\1"),
        (r"rescale\.scales\.(\d+)\.(\d+\.\w+)", lambda m, _: f"backbone.fpn{int(m[1]) + 1}.{m[2]}"),
        (r"decoder\.classifier\.(\w+)", r"decode_head.conv_seg.\1"),
        (
            rf"decoder\.scales\.(\d+\.\d+)\.{_PART}",
            lambda m, _: _conv_norm(m, f"decode_head.scale_heads.{m[1]}"),
        ),
        (
            rf"decoder\.pooling\.convs\.(\d+)\.{_PART}",
            lambda m, _: _conv_norm(m, f"decode_head.psp_modules.{m[1]}.1"),
        ),
        (rf"decoder\.pooling\.bottleneck\.{_PART}", lambda m, _: _conv_norm(m, "decode_head.bottleneck")),
        (
            rf"decoder\.laterals\.(\d+)\.{_PART}",
            lambda m, _: _conv_norm(m, f"decode_head.lateral_convs.{m[1]}"),
        ),
        (rf"decoder\.smooths\.(\d+)\.{_PART}", lambda m, _: _conv_norm(m, f"decode_head.fpn_convs.{m[1]}")),
        (rf"decoder\.bottleneck\.{_PART}", lambda m, _: _conv_norm(m, "decode_head.fpn_bottleneck")),
        (rf"auxiliary\.conv\.{_PART}", lambda m, _: _conv_norm(m, "auxiliary_head.convs.0")),
        (r"auxiliary\.classifier\.(\w+)", r"auxiliary_head.conv_seg.\1"),
    )
)


def _published_name(name: str, network: Any) -> str | None:
    """Return OpenMMLab's name of a tensor outside the backbone model, `None` for the others."""
    for pattern, published in _RENAMES:
        if match := pattern.match(name):
            return match.expand(published) if isinstance(published, str) else published(match, network)
    return None


def _is_unused(key: str, network: Any) -> bool:
    """Whether a tensor has no place in the network by design."""
    if key.startswith("auxiliary_head."):
        return getattr(network, "auxiliary", None) is None
    return get_record(network.init_args["model"]).family == "vim" and key.removeprefix("backbone.") in _UNUSED
