"""Published weights of detectors and segmenters: names, addresses and published scores."""

from typing import NamedTuple

from timm.models import PretrainedCfg

_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download"
_SHVIT = "https://github.com/ysj9909/SHViT/releases/download/v1.0"


class DenseWeights(NamedTuple):
    """Published checkpoint of a detector or segmenter.

    Attributes:
        model: registered name of the backbone.
        tag: rest of the name.
        head: head of `lightspine.dense.create_detector` or `create_segmenter`.
        dataset: "coco" or "ade20k".
        url: address of the file.
        score: score that the authors report, "" if none.
    """

    model: str
    tag: str
    head: str
    dataset: str
    url: str
    score: str

    @property
    def name(self) -> str:
        """Name with tag, such as `vmamba_tiny.mask_rcnn_1x_coco`."""
        return f"{self.model}.{self.tag}"

    @property
    def cfg(self) -> PretrainedCfg:
        """The source in timm's form; both repositories are under the MIT license."""
        return PretrainedCfg(url=self.url, tag=self.tag, license="mit")


def _mask_rcnn(model: str, schedule: str, file: str, score: str) -> DenseWeights:
    url = f"{_VMAMBA}/%23v2det/mask_rcnn_vssm_fpn_coco_{file}.pth"
    return DenseWeights(model, f"mask_rcnn_{schedule}_coco", "mask_rcnn", "coco", url, score)


def _upernet(model: str, file: str, score: str) -> DenseWeights:
    url = f"{_VMAMBA}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_{file}.pth"
    return DenseWeights(model, "upernet_ade20k", "upernet", "ade20k", url, score)


_ALL = (
    _mask_rcnn("vmamba_tiny", "1x", "tiny_s_epoch_12", "47.3 box AP, 42.7 mask AP"),
    _mask_rcnn("vmamba_tiny", "3x", "tiny_ms_3x_s_epoch_31", "48.8 box AP, 43.7 mask AP"),
    _mask_rcnn("vmamba_small", "1x", "small_epoch_11", "48.7 box AP, 43.7 mask AP"),
    _mask_rcnn("vmamba_small", "3x", "small_ms_3x_epoch_32", "49.9 box AP, 44.2 mask AP"),
    _mask_rcnn("vmamba_base", "1x", "base_epoch_12_bs8", "49.2 box AP, 44.1 mask AP"),
    _upernet("vmamba_tiny", "tiny_s_iter_160000", "47.9 mIoU"),
    _upernet("vmamba_small", "small_iter_144000", "50.6 mIoU"),
    _upernet("vmamba_base", "base_iter_160000", "51.0 mIoU"),
    DenseWeights(
        "shvit_s4", "retinanet_1x_coco", "retinanet", "coco", f"{_SHVIT}/retinanet_shvit_s4_1x_coco.pth", ""
    ),
    DenseWeights(
        "shvit_s4", "mask_rcnn_1x_coco", "mask_rcnn", "coco", f"{_SHVIT}/maskrcnn_shvit_s4_1x_coco.pth", ""
    ),
)
DENSE_WEIGHTS = {weights.name: weights for weights in _ALL}
"""Published detectors and segmenters by name; the first of a head, model and data set is the default."""
