"""Published detectors and segmenters, loaded from files in OpenMMLab's layout, against OpenMMLab's outputs.

The reference values are from mmdetection and mmsegmentation in float64.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.dense import create_detector, create_segmenter, feature_backbone
from support.family_figures import assert_map
from support.openmmlab_files import case_images, denormalize, write_openmmlab
from support.reference import assert_close, read_figure

TOLERANCE = 1e-7
SLOW = pytest.mark.slow

DETECTORS = [
    pytest.param("vmamba_tiny_s1l8_mask_rcnn", "mask_rcnn", "vmamba_tiny", marks=SLOW),
    pytest.param("shvit_s4_mask_rcnn", "mask_rcnn", "shvit_s4", marks=SLOW),
    pytest.param("efficientmod_s_mask_rcnn", "mask_rcnn", "efficientmod_s", marks=SLOW),
    pytest.param("shvit_s4_retinanet", "retinanet", "shvit_s4"),
    pytest.param("efficientvim_m4_retinanet", "retinanet", "efficientvim_m4", marks=SLOW),
]
SEGMENTERS = [
    pytest.param("efficientvim_m4_semantic_fpn", "semantic_fpn", "efficientvim_m4"),
    pytest.param("vmamba_tiny_s1l8_upernet", "upernet", "vmamba_tiny", marks=SLOW),
]


class DetectorRun:
    """Everything that a detector computes for one normalized image, recorded with hooks."""

    def __init__(self, detector: Any, images: Tensor, norms_in_neck: bool) -> None:
        self.recorded: dict[str, list[Any]] = {}
        backbone = feature_backbone(detector)
        modules = {
            "backbone": backbone.model if norms_in_neck else backbone,
            "pyramid": detector.backbone,
            "dense": getattr(detector, "head", None),
            "rpn_head": getattr(getattr(detector, "rpn", None), "head", None),
            "rpn": getattr(detector, "rpn", None),
        }
        if hasattr(detector, "roi_heads"):
            modules |= {
                "box_predictor": detector.roi_heads.box_predictor[0],
                "mask_predictor": detector.roi_heads.mask_predictor,
            }
        hooks = [
            module.register_forward_hook(lambda _m, _i, out, name=name: self._record(name, out))
            for name, module in modules.items()
            if module is not None
        ]
        with torch.inference_mode():
            self.found = detector([denormalize(images)[0]])[0]
        for hook in hooks:
            hook.remove()

    def _record(self, name: str, output: Any) -> None:
        self.recorded[name] = output


@cache
def _figure(name: str) -> dict[str, Any]:
    return read_figure(f"dense/{name}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a figure's checkpoint once."""
    folder = tmp_path_factory.mktemp("openmmlab")

    def write(name: str) -> Path:
        path = folder / f"{name}.pth"
        return path if path.exists() else write_openmmlab(name, folder)

    return write


@pytest.mark.parametrize(("figure", "head", "model"), DETECTORS)
def test_a_published_detector_gives_openmmlabs_results(
    files: Any, figure: str, head: Any, model: str
) -> None:
    detector = create_detector(head, model, checkpoint=files(figure), resize=None).double().eval()

    norms_in_neck = "neck.batch_norm.0.weight" in _figure(figure)["checkpoint"]
    for case in _figure(figure)["cases"]:
        run = DetectorRun(detector, case_images(case), norms_in_neck)
        for i, expected in enumerate(case["backbone"]):
            assert_map(f"map {i}", run.recorded["backbone"][i], expected, TOLERANCE)
        levels = list(run.recorded["pyramid"].values())
        for i, expected in enumerate(case["pyramid"]):
            assert_map(f"level {i}", levels[i], expected, TOLERANCE)
        if head == "retinanet":
            _assert_dense(run, case)
        else:
            _assert_proposals(run, case)
        _assert_detections(run, case["detections"])


def _assert_dense(run: DetectorRun, case: dict[str, Any]) -> None:
    sizes = [expected["shape"][2:] for expected in case["dense"]["logits"]]
    for name, key in (("logits", "cls_logits"), ("deltas", "bbox_regression")):
        output = run.recorded["dense"][key]
        parts = output.split([9 * height * width for height, width in sizes], dim=1)
        for level, (part, expected) in enumerate(zip(parts, case["dense"][name], strict=True)):
            height, width = expected["shape"][2:]
            maps = part.reshape(1, height, width, -1).permute(0, 3, 1, 2)
            assert_map(f"{name} of level {level}", maps, expected, TOLERANCE)


def _assert_proposals(run: DetectorRun, case: dict[str, Any]) -> None:
    logits, deltas = run.recorded["rpn_head"]
    for level, expected in enumerate(case["rpn"]["logits"]):
        assert_map(f"objectness of level {level}", logits[level], expected, TOLERANCE)
        assert_map(f"deltas of level {level}", deltas[level], case["rpn"]["deltas"][level], TOLERANCE)
    boxes = run.recorded["rpn"][0][0]
    expected = case["rpn"]["after_nms"]
    assert len(boxes) == expected["kept"]
    assert_close("first proposals", boxes[:5], expected["first"]["boxes"], TOLERANCE)
    assert_close("last proposal", boxes[-1], expected["last"]["box"], TOLERANCE)
    assert_close("sum of the proposals", boxes.sum(0), expected["box_sum"], TOLERANCE)
    logits, deltas = run.recorded["box_predictor"]
    # Published: background last, and no offsets for it.
    assert_map("class logits", logits.roll(-1, dims=1)[None], case["roi"]["class_logits"], TOLERANCE)
    assert_map("box deltas", deltas[None, :, 4:], case["roi"]["deltas"], TOLERANCE)
    assert_map("mask logits", run.recorded["mask_predictor"][:, 1:], case["mask_logits"], TOLERANCE)


def _assert_detections(run: DetectorRun, expected: dict[str, Any]) -> None:
    found = run.found
    assert len(found["boxes"]) == expected["count"]
    assert (found["labels"] - 1).tolist() == expected["labels"]
    assert_close("scores", found["scores"], expected["scores"], TOLERANCE)
    assert_close("boxes", found["boxes"], expected["boxes"], TOLERANCE)
    if "mask_areas" in expected:
        areas = (found["masks"][:, 0] >= 0.5).flatten(1).sum(1)
        # Published masks are pasted in float32.
        assert (areas - torch.tensor(expected["mask_areas"])).abs().max() <= 1


@pytest.mark.parametrize(("figure", "head", "model"), SEGMENTERS)
def test_a_published_segmenter_gives_openmmlabs_results(
    files: Any, figure: str, head: Any, model: str
) -> None:
    segmenter = create_segmenter(head, model, checkpoint=files(figure)).double().eval()

    for case in _figure(figure)["cases"]:
        images = case_images(case)
        height, width = case["network_input"][2:]
        images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
        with torch.inference_mode():
            maps = segmenter.backbone(images)
            for i, expected in enumerate(case["backbone"]):
                assert_map(f"map {i}", maps[i], expected, TOLERANCE)
            if "pyramid" in case:
                for i, level in enumerate(segmenter.decoder.pyramid(maps).values()):
                    assert_map(f"level {i}", level, case["pyramid"][i], TOLERANCE)
            assert_map("head logits", segmenter.decoder(maps), case["head_logits"], TOLERANCE)
            if "auxiliary_head_logits" in case:
                auxiliary = segmenter.auxiliary(maps[-2])
                assert_map("auxiliary logits", auxiliary, case["auxiliary_head_logits"], TOLERANCE)
            logits = segmenter(images)
            assert_map("logits", logits, case["logits_at_image_size"], TOLERANCE)
            final = F.interpolate(logits, case["ori_shape"], mode="bilinear", align_corners=False)
        assert_map("final logits", final, case["final"], TOLERANCE)
        counts = torch.bincount(final.argmax(1).flatten(), minlength=150)
        histogram = {str(i): int(count) for i, count in enumerate(counts) if count}
        assert histogram == case["argmax_histogram"]
