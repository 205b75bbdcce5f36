"""A published detector in OpenMMLab's layout, exported: its file finds what PyTorch finds on photographs."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lightspine.dense import create_detector
from lightspine.export import export_onnx
from lightspine_runtime import OnnxModel
from support.coco import unpack
from support.openmmlab_files import write_openmmlab

IMAGES = 6


def _coco(images: list[dict[str, int]], annotations: list[dict[str, Any]]) -> COCO:
    found = COCO()
    found.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label} for label in sorted({a["category_id"] for a in annotations})],
    }
    found.createIndex()
    return found


def _objects(image_id: int, boxes: Any, labels: Any) -> list[dict[str, Any]]:
    corners = np.asarray(boxes, dtype=np.float64)
    return [
        {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
        }
        for (left, top, right, bottom), label in zip(corners.tolist(), labels, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_exported_file_of_a_published_detector_scores_100_against_pytorch(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = write_openmmlab("shvit_s4_retinanet", tmp_path)
    detector = create_detector("retinanet", "shvit_s4", checkpoint=checkpoint, resize=(160, 256)).eval()
    file = export_onnx(detector, tmp_path / "detector.onnx", with_preprocessing=True).path
    model = OnnxModel(file)

    paths = sorted(unpack("coco_free", tmp_path_factory).rglob("*.jpg"))[:IMAGES]
    images, expected, actual = [], [], []
    for image_id, path in enumerate(paths, start=1):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        images.append({"id": image_id, "height": pixels.shape[0], "width": pixels.shape[1]})
        with torch.inference_mode():
            found = detector([torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255])[0]
        expected += _objects(image_id, found["boxes"], found["labels"])
        detected = model.detect_pixels(pixels)
        scored = _objects(image_id, detected.boxes, detected.labels)
        actual += [o | {"score": float(s)} for o, s in zip(scored, detected.scores, strict=True)]
    assert len(expected) >= 10 * IMAGES

    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(images, [o | {"id": i} for i, o in enumerate(expected, start=1)])
        scores = COCOeval(truth, truth.loadRes(actual), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    assert scores.stats[0] >= 0.999
