"""Published detectors, segmenters and backbones by name, from a filled cache: no download."""

from pathlib import Path

import pytest
import torch

import lightspine
from lightspine.dense import create_detector, create_segmenter
from lightspine.errors import UsageError
from lightspine.models.dense_weights import DENSE_WEIGHTS
from support.reference import fill_checkpoint, read_figure, write_official_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_backbone_starts_from_the_published_classifier(cache: Path) -> None:
    layout = read_figure("shvit/shvit_s1")["checkpoint"]
    write_official_file(cache / "shvit_s1.pth", fill_checkpoint(layout))
    detector = create_detector("retinanet", "shvit_s1", 2, pretrained_backbone=True, channels=16)
    expected = lightspine.create_model("shvit_s1", checkpoint=cache / "shvit_s1.pth")
    found = dict(detector.named_parameters())
    name = next(name for name in found if name.endswith("stem.0.conv.weight"))
    assert torch.equal(found[name], expected.stem[0].conv.weight)


def test_every_name_stands_for_its_head_and_model() -> None:
    for name, weights in DENSE_WEIGHTS.items():
        assert name.startswith(f"{weights.model}.{weights.head}_")
        assert name.endswith(f"_{weights.dataset}")
        assert weights.url.startswith("https://github.com/")
        assert weights.model in lightspine.list_models()


@pytest.mark.usefixtures("cache")
def test_published_name_is_looked_for_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12\.pth is not in"):
        create_detector("mask_rcnn", "vmamba_tiny", pretrained="coco")
    with pytest.raises(UsageError, match=r"512x512_base_iter_160000\.pth is not in"):
        create_segmenter("upernet", "vmamba_base", pretrained="ade20k")
    with pytest.raises(UsageError, match=r"mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31\.pth is not in"):
        create_detector("mask_rcnn", "vmamba_tiny", pretrained="vmamba_tiny.mask_rcnn_3x_coco")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pretrained": "voc"},
            r"no published weights 'voc' of mask_rcnn over vmamba_tiny: expected coco, vmamba",
        ),
        ({"pretrained": "coco", "pretrained_backbone": True}, "expected one of checkpoint, pretrained and"),
    ],
    ids=["unknown", "both"],
)
def test_wrong_use_is_told(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_detector("mask_rcnn", "vmamba_tiny", 3, **options)


def test_model_without_published_detectors_is_told() -> None:
    with pytest.raises(UsageError, match="of retinanet over vim_tiny: expected a checkpoint file"):
        create_detector("retinanet", "vim_tiny", 3, pretrained="coco")
