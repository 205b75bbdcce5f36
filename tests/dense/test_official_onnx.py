"""A published detector on COCO images, in PyTorch and as an exported file, scored by pycocotools."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lightspine.dense import load_network
from lightspine.dense.checkpoint import network_metadata
from lightspine.evaluation import evaluate_detector
from lightspine.export import export_onnx
from support.coco import unpack
from support.openmmlab_files import write_openmmlab

IMAGES = 6
OPTIONS: dict[str, Any] = {"resize": (192, 320), "score_threshold": 0.05}


def pycocotools_scores(truth: Path, results: Path) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        scorer = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_exported_detector_scores_as_in_pytorch(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
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

    detector, about = load_network(file, **OPTIONS)
    exported = tmp_path / "detector.onnx"
    export_onnx(
        detector,
        exported,
        with_preprocessing=True,
        class_names=about.class_names,
        checkpoint=network_metadata(detector, class_names=about.class_names),
    )
    onnx_report = evaluate_detector(
        exported, truth, images=coco / "val2017", results=tmp_path / "onnx.json", score_threshold=0.05
    )

    assert 5 < report["scores"]["box"]["AP"] < 95
    for name, score in report["scores"]["box"].items():
        assert score is None or abs(score - onnx_report["scores"]["box"][name]) < 0.1, name
    reference, exported_scores = (
        pycocotools_scores(truth, tmp_path / f"{name}.json") for name in ("pytorch", "onnx")
    )
    np.testing.assert_allclose(exported_scores, reference, atol=1e-3)
    np.testing.assert_allclose(reference[0] * 100, report["scores"]["box"]["AP"], atol=1e-6)
