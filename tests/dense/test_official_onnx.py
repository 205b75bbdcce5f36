"""A published detector on COCO images, in PyTorch and with its exported pyramid, scored by pycocotools."""

import contextlib
import io
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from lightspine.dense import load_network
from lightspine.evaluation import detection as detection_module
from lightspine.evaluation import evaluate_detector
from lightspine.export import export_onnx
from support.coco import unpack
from support.openmmlab_files import write_openmmlab

IMAGES = 6
OPTIONS: dict[str, Any] = {"resize": (192, 320), "score_threshold": 0.05}


class ExportedPyramid(nn.Module):
    """Backbone and pyramid of a detector, run by ONNX Runtime."""

    def __init__(self, path: Path, body: Any) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.strides, self.out_channels = body.strides, body.out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})
        return OrderedDict(
            (str(stride), torch.from_numpy(level)) for stride, level in zip(self.strides, levels, strict=True)
        )


def pycocotools_scores(truth: Path, results: Path) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        scorer = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats


@pytest.mark.slow
def test_exported_detector_scores_as_in_pytorch(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco = unpack("coco_free", tmp_path_factory)
    file = write_openmmlab("shvit_s4_retinanet", tmp_path)
    listing = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    listing |= {"images": listing["images"][:IMAGES]}
    truth = tmp_path / "truth.json"

    def evaluate(results: Path) -> dict[str, Any]:
        return evaluate_detector(file, truth, images=coco / "val2017", results=results, **OPTIONS)

    # The weights are random, so that real objects would score 0: every third detection is an object instead.
    listing["annotations"] = []
    kept = {image["id"] for image in listing["images"]}
    annotations = json.loads((coco / "annotations" / "instances_val2017.json").read_text())["annotations"]
    truth.write_text(json.dumps(listing | {"annotations": [a for a in annotations if a["image_id"] in kept]}))
    evaluate(tmp_path / "first.json")
    found = json.loads((tmp_path / "first.json").read_text())
    assert len({box["category_id"] for box in found}) > 3
    listing["annotations"] = [
        {
            "id": number,
            "image_id": box["image_id"],
            "category_id": box["category_id"],
            "bbox": box["bbox"],
            "area": box["bbox"][2] * box["bbox"][3],
            "iscrowd": 0,
        }
        for number, box in enumerate(found[::3], 1)
    ]
    truth.write_text(json.dumps(listing))
    report = evaluate(tmp_path / "pytorch.json")

    detector, _ = load_network(file, **OPTIONS)
    exported = tmp_path / "pyramid.onnx"
    export_onnx(detector, exported)
    load = detection_module.load_network

    def load_exported(*args: Any, **options: Any) -> Any:
        network, metadata = load(*args, **options)
        body = network.backbone
        network.backbone = ExportedPyramid(exported, body)
        return network, metadata

    monkeypatch.setattr(detection_module, "load_network", load_exported)
    onnx_report = evaluate(tmp_path / "onnx.json")

    assert 5 < report["scores"]["box"]["AP"] < 95
    for name, score in report["scores"]["box"].items():
        assert score is None or abs(score - onnx_report["scores"]["box"][name]) < 0.1, name
    reference, exported_scores = (
        pycocotools_scores(truth, tmp_path / f"{name}.json") for name in ("pytorch", "onnx")
    )
    np.testing.assert_allclose(exported_scores, reference, atol=1e-3)
    np.testing.assert_allclose(reference[0] * 100, report["scores"]["box"]["AP"], atol=1e-6)
