"""RetinaNet, Mask R-CNN and Cascade Mask R-CNN over any backbone, with the published settings."""

import math
from collections import OrderedDict
from typing import Literal, get_args

import torch.nn as nn
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.heads.detection_transform import DetectionTransform
from lightspine.heads.features import FeatureBackbone
from lightspine.heads.fpn import FeaturePyramid
from lightspine.heads.mask_rcnn import MaskRCNN, build_roi_heads
from lightspine.heads.retinanet import RetinaNet
from lightspine.heads.rpn import ProposalNetwork
from lightspine.heads.simple_fpn import SimpleFeaturePyramid

DetectorName = Literal["retinanet", "mask_rcnn", "cascade_mask_rcnn"]


class PyramidBackbone(nn.Module):
    """A backbone and its pyramid, as torchvision's detectors take them: images to maps by stride.

    Args:
        backbone: gives the maps.
        pyramid: makes the levels of them.
    """

    def __init__(self, backbone: FeatureBackbone, pyramid: FeaturePyramid | SimpleFeaturePyramid):
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.out_channels = pyramid.channels
        self.strides = pyramid.strides

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Map images (B, C, H, W) to the levels, stride (as a string) to map."""
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
) -> RetinaNet | MaskRCNN:
    """Build a detector with the published settings.

    - "retinanet": levels of strides 8 to 128; boxes only.
    - "mask_rcnn": levels of strides 4 to 64; two linear layers for the boxes, four convolutions for the
      masks.
    - "cascade_mask_rcnn": the same levels, three stages (IoU 0.5, 0.6, 0.7) that move boxes of all classes
      alike, and the heads of ViTDet: two convolutions before the proposals, four convolutions and one linear
      layer for the boxes, LayerNorm in the box and mask heads.

    The pyramid follows from the backbone: a plain one (Vim, ViTs) gets ViTDet's, of its last map; one with a
    map of the finest stride an FPN; one whose maps begin later (EfficientViM, SHViT) an FPN with transposed
    convolutions down to it. Maps finer than the finest stride are not used. What a pyramid lacks at the
    coarse end is max-pooled, in RetinaNet over an FPN made by convolutions.

    The detector is torchvision's to use. In training, `detector(images, targets)` returns a dict of losses
    to sum; in evaluation mode `detector(images)` returns, for each image, `boxes` (x1, y1, x2, y2 in pixels
    of the image as given), `scores`, `labels` and with a mask head `masks` (N, 1, H, W) in 0..1. Images are
    a list of (C, H, W) tensors in 0..1, of any sizes; they are normalised with the backbone's own statistics.
    Targets are dicts of `boxes` (N, 4), `labels` (N,) from 1 to `num_classes` and, with a mask head, `masks`
    (N, H, W); an image may have no objects (N = 0). Crowds should be left out of the targets.

    Args:
        name: the detector.
        backbone: the maps; the ones that the detector does not use are dropped from it.
        num_classes: classes of objects, background not counted.
        channels: width of the pyramid.
        resize: (shorter side, longest side) that images are brought to outside training, `None` to leave
            them as they are. In training they are always taken as they are.
        score_threshold: least score of a prediction.
        detections_per_image: most predictions of an image.
        anchor_scale: factor of the published anchors' sides, which begin at 32 px: less where objects are
            smaller than that.

    Raises:
        UsageError: an unknown name, no class, an anchor scale that is not above 0, or a backbone whose
            strides no pyramid fits.

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
    inputs = DetectionTransform(
        backbone.image_mean, backbone.image_std, resize, num_classes, masks=not retina
    )
    body = PyramidBackbone(backbone, _build_pyramid(backbone, channels, retina))
    if retina:
        return RetinaNet(
            body,
            body.strides,
            num_classes,
            inputs,
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
        least_overlap=0.0 if cascade else 0.3,
        anchor_scale=anchor_scale,
    )
    return MaskRCNN(body, rpn, roi_heads, inputs)


def _build_pyramid(
    backbone: FeatureBackbone, channels: int, retina: bool
) -> FeaturePyramid | SimpleFeaturePyramid:
    """Make five levels: strides 8 to 128 for RetinaNet, 4 to 64 for the others."""
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
