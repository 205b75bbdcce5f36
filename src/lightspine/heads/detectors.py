"""RetinaNet, Mask R-CNN and Cascade Mask R-CNN on any backbone, with the published settings."""

import math
from collections import OrderedDict
from typing import Literal, get_args

import torch.nn as nn
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.heads.detection_transform import DetectionTransform, ResizeRounding
from lightspine.heads.features import FeatureBackbone
from lightspine.heads.fpn import FeaturePyramid
from lightspine.heads.mask_rcnn import MaskRCNN, build_roi_heads
from lightspine.heads.retinanet import RetinaNet
from lightspine.heads.rpn import ProposalNetwork
from lightspine.heads.simple_fpn import SimpleFeaturePyramid

DetectorName = Literal["retinanet", "mask_rcnn", "cascade_mask_rcnn"]


class PyramidBackbone(nn.Module):
    """Backbone and feature pyramid with the interface that torchvision's detectors expect.

    Args:
        backbone: returns the feature maps.
        pyramid: computes the pyramid levels from them.
    """

    def __init__(self, backbone: FeatureBackbone, pyramid: FeaturePyramid | SimpleFeaturePyramid):
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.out_channels = pyramid.channels
        self.strides = pyramid.strides

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels of images (B, C, H, W): stride (as a string) -> map."""
        levels: OrderedDict[str, Tensor] = self.pyramid(self.backbone(x))
        return levels


def build_detector(
    name: DetectorName,
    backbone: FeatureBackbone,
    num_classes: int,
    *,
    channels: int = 256,
    resize: tuple[int, int] | None = (800, 1333),
    score_threshold: float = 0.05,
    detections_per_image: int = 100,
    anchor_scale: float = 1.0,
    resize_rounding: ResizeRounding = "nearest",
) -> RetinaNet | MaskRCNN:
    """Build a detector with the published settings.

    - "retinanet": strides 8 to 128, boxes only.
    - "mask_rcnn": strides 4 to 64; two linear layers in the box head, four convolutions in the mask head.
    - "cascade_mask_rcnn": strides 4 to 64, three stages (IoU 0.5, 0.6, 0.7) with class-agnostic boxes, and
      ViTDet's heads: two convolutions in the RPN, four convolutions and one linear layer in the box heads,
      LayerNorm in box and mask heads.

    The pyramid depends on the backbone: ViTDet's simple feature pyramid on the last map of a plain backbone
    (Vim, ViTs); an FPN if the backbone has a map of the finest stride; an FPN with transposed convolutions if
    its maps start at a coarser stride (EfficientViM, SHViT). Maps finer than the finest stride are unused.
    Missing coarse levels are max-pooled, or computed by convolutions in RetinaNet's FPN.

    The interface is torchvision's. In training mode `detector(images, targets)` returns a dict of losses to
    sum; in evaluation mode `detector(images)` returns, for each image, `boxes` (x1, y1, x2, y2 in pixels of
    the input image), `scores`, `labels` and, with a mask head, `masks` (N, 1, H, W) in 0..1. Images are a
    list of (C, H, W) tensors in 0..1 of any size, normalized with the backbone's statistics. Targets are
    dicts of `boxes` (N, 4), `labels` (N,) from 1 to `num_classes` and, with a mask head, `masks` (N, H, W);
    an image may have no objects (N = 0). Leave crowd annotations out of the targets.

    Args:
        name: detector name.
        backbone: returns the feature maps; maps that the detector does not use are removed from it.
        num_classes: object classes, without background.
        channels: pyramid channels.
        resize: shorter side and maximum longer side of images in evaluation mode; `None` keeps their size.
            Images are never resized in training mode.
        score_threshold: minimum score of a prediction.
        detections_per_image: maximum number of predictions per image.
        anchor_scale: factor of the published anchor sizes, which start at 32 px; below 1 for smaller objects.
        resize_rounding: see `lightspine.heads.detection_transform.DetectionTransform`.

    Raises:
        UsageError: an unknown name, no class, an anchor scale that is not positive, or backbone strides that
            no pyramid supports.

    Examples:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1", features_only=True)
        >>> detector = build_detector("retinanet", FeatureBackbone(model), num_classes=80, resize=None)
        >>> sorted(detector.eval()([torch.zeros(3, 97, 161)])[0])
        ['boxes', 'labels', 'scores']
    """
    if name not in get_args(DetectorName):
        raise UsageError(f"the detector must be one of {', '.join(get_args(DetectorName))}, got {name!r}")
    if num_classes < 1:
        raise UsageError(f"num_classes must be 1 or more, got {num_classes}")
    if anchor_scale <= 0:
        raise UsageError(f"anchor_scale must be above 0, got {anchor_scale}")
    retina = name == "retinanet"
    transform = DetectionTransform(
        backbone.image_mean,
        backbone.image_std,
        resize,
        num_classes,
        masks=not retina,
        rounding=resize_rounding,
    )
    body = PyramidBackbone(backbone, _build_pyramid(backbone, channels, retina))
    if retina:
        return RetinaNet(
            body,
            body.strides,
            num_classes,
            transform,
            score_threshold=score_threshold,
            detections_per_image=detections_per_image,
            anchor_scale=anchor_scale,
        )
    cascade = name == "cascade_mask_rcnn"
    roi_heads = build_roi_heads(
        channels, body.strides[:4], num_classes, cascade, score_threshold, detections_per_image
    )
    rpn = ProposalNetwork(
        channels,
        body.strides,
        convs=2 if cascade else 1,
        min_overlap=0.0 if cascade else 0.3,
        anchor_scale=anchor_scale,
    )
    return MaskRCNN(body, rpn, roi_heads, transform)


def _build_pyramid(
    backbone: FeatureBackbone, channels: int, retina: bool
) -> FeaturePyramid | SimpleFeaturePyramid:
    """Build the five-level pyramid: strides 8 to 128 for RetinaNet, 4 to 64 for the others."""
    finest, levels = (8 if retina else 4), 5
    if backbone.is_plain:
        backbone.keep_maps([len(backbone.strides) - 1])
        coarser = 2 if retina else 1
        strides = [finest * 2**i for i in range(levels - coarser)]
        return SimpleFeaturePyramid(
            backbone.channels[0], backbone.strides[0], strides=strides, channels=channels, coarser=coarser
        )
    used = [i for i, stride in enumerate(backbone.strides) if stride >= finest]
    if not used:
        raise UsageError(f"a detector needs a map of stride {finest} or more, got {backbone.strides}")
    backbone.keep_maps(used)
    reached = round(math.log2(backbone.strides[-1] / finest)) + 1
    return FeaturePyramid(
        backbone.channels,
        backbone.strides,
        channels=channels,
        finest_stride=finest,
        coarser=max(levels - reached, 0),
        coarser_by="conv" if retina else "max_pool",
    )
