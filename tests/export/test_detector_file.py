"""Exported detectors find the objects that PyTorch finds, from the image to boxes and masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from lightspine.errors import LightspineError, UsageError
from lightspine.export import export_onnx
from lightspine.export.detection import (
    DetectionSettings,
    WholeDetector,
    detection_settings,
    preparation_model,
)
from lightspine.export.onnx_network import OnnxDetector
from lightspine.export.verification import open_session
from lightspine.heads import build_detector
from lightspine.heads.detection_transform import resize_rounded
from lightspine_runtime import OnnxModel
from lightspine_runtime import UsageError as RuntimeUsageError
from lightspine_runtime.detection import resize_pixels
from support.dense import MEMBERS, few_proposals, small_backbone
from support.exporting import disturb

HEADS = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")
SIZE = (90, 150)
NAMES = ["cell", "dust", "text"]


def small_detector(head: Any, member: str = "shvit", **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"channels": 8, "score_threshold": 0.02, "resize": (64, 128)} | options
    detector = few_proposals(disturb(build_detector(head, small_backbone(member), 3, **options)), 40)
    if head == "retinanet":
        _spread_scores(detector)
    return detector


def _spread_scores(detector: Any) -> None:
    """Give each output channel of RetinaNet's classifier logits of mean -3 and standard deviation 1.

    Those of a new head hardly differ from each other, so that rounding would decide their order.
    """
    layer = detector.head.classification_head.cls_logits
    found: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda *values: found.append(values[-1]))
    with torch.no_grad():
        detector([torch.from_numpy(picture(*SIZE)).permute(2, 0, 1) / 255])
        hook.remove()
        deviation, mean = torch.std_mean(found[0], (0, 2, 3))
        layer.weight /= deviation[:, None, None, None]
        layer.bias.copy_((layer.bias - mean) / deviation - 3)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise, whose pixels hardly depend on how the rounding of resized values falls."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# An export takes half a minute.
@pytest.fixture(
    scope="module",
    params=[
        "retinanet",
        "mask_rcnn",
        # The export takes two minutes of CPU time, longer beside other programs.
        pytest.param("cascade_mask_rcnn", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small detector of each head and its file, which takes pixels of one size and resizes them."""
    detector = small_detector(request.param)
    path = tmp_path_factory.mktemp("detector") / f"{request.param}.onnx"
    # One size, because sizes that are symbols take minutes to trace.
    report = export_onnx(
        detector, path, class_names=NAMES, with_preprocessing=True, fixed_size=SIZE, opset=20
    )
    return detector, report, OnnxModel(path)


def check_detections(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    """Check that the detections are equal up to rounding, in any order where scores are equal."""
    assert len(expected["boxes"])
    assert {name: values.shape for name, values in actual.items()} == {
        name: values.shape for name, values in expected.items()
    }
    torch.testing.assert_close(actual["scores"], expected["scores"], atol=1e-4, rtol=1e-3)
    same = expected["labels"][:, None] == actual["labels"]
    same &= (expected["scores"][:, None] - actual["scores"]).abs() < 1e-4
    same &= (expected["boxes"][:, None] - actual["boxes"]).abs().amax(-1) < 1e-2
    # The last one may be one of several with the same score.
    assert same.any(1)[:-1].all()
    if "masks" in expected:
        partner = same.int().argmax(1)
        different = (actual["masks"][partner] >= 0.5) != (expected["masks"] >= 0.5)
        assert different.float().mean() < 1e-3


def test_file_finds_the_objects_that_pytorch_finds(exported: Any) -> None:
    detector, _, model = exported
    image = torch.from_numpy(picture(*SIZE)).permute(2, 0, 1) / 255
    with torch.inference_mode():
        (expected,), (actual,) = detector([image]), OnnxDetector(model)([image])
    check_detections(expected, actual)


def test_report_compares_detections(exported: Any) -> None:
    _, report, _ = exported
    assert [found.shape for found in report.differences] == [(1, *SIZE)]
    assert report.differences[0].relative < 1e-4


def test_inputs_and_outputs_are_named(exported: Any) -> None:
    _, report, model = exported
    masks = [] if "retinanet" in report.path.stem else ["masks"]
    assert model.outputs == ["boxes", "scores", "labels", *masks]
    assert (model.session.get_inputs()[0].name, model.session.get_inputs()[0].shape) == (
        "pixels",
        [1, *SIZE, 3],
    )
    assert model.session.get_outputs()[0].shape == ["detections", 4]


def test_file_has_standard_operators_only(exported: Any) -> None:
    content = onnx.load(exported[1].path)
    onnx.checker.check_model(content, full_check=True)
    assert {entry.domain for entry in content.opset_import} == {""}
    assert {"NonMaxSuppression", "Resize"} <= {node.op_type for node in content.graph.node}


def test_metadata_hold_classes_and_thresholds(exported: Any) -> None:
    _, report, model = exported
    entries = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    settings = json.loads(entries["lightspine.detection"])
    assert settings["score_threshold"] == 0.02
    assert (settings["nms_threshold"], settings["detections_per_image"]) == (0.5, 100)
    assert settings["resize"] == [64, 128]
    assert (model.kind, model.class_names) == ("detector", NAMES)


def test_image_without_objects_gives_empty_outputs(exported: Any, tmp_path: Path) -> None:
    _, report, _ = exported
    content = onnx.load(report.path)
    for tensor in content.graph.initializer:
        if tensor.name.endswith("score_thresh"):
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, onnx.TensorProto.FLOAT, [], [0.9999]))
    onnx.save(content, tmp_path / "strict.onnx")
    model = OnnxModel(tmp_path / "strict.onnx")
    found = model.detect_pixels(picture(*SIZE))
    assert (len(found), found.boxes.shape, found.scores.shape, found.names) == (0, (0, 4), (0,), [])
    assert found.masks is None or found.masks.shape == (0, *SIZE)


def test_image_of_another_size_is_refused(exported: Any) -> None:
    with pytest.raises(
        RuntimeUsageError, match=r"expected an image of 90x150 px, .* but the image has 91x150"
    ):
        exported[2].detect_pixels(picture(91, 150))


def test_batch_is_refused(exported: Any) -> None:
    with pytest.raises(RuntimeUsageError, match=r"expected one image at a time for .* got a batch of 2"):
        exported[2].run(np.zeros((2, *SIZE, 3), np.uint8))


@pytest.mark.parametrize(
    ("score", "message"),
    [(1.5, "from 0 to 1, got 1.5"), (0.01, "at least 0.02, with which .* was exported, got 0.01")],
)
def test_score_threshold_out_of_range_is_refused(exported: Any, score: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OnnxDetector(exported[2], score_threshold=score)


def test_higher_threshold_and_smaller_number_select_detections(exported: Any) -> None:
    model = exported[2]
    image = torch.from_numpy(picture(*SIZE)).permute(2, 0, 1) / 255
    (everything,) = OnnxDetector(model)([image])
    score = float(everything["scores"][2])
    (above,) = OnnxDetector(model, score_threshold=score)([image])
    assert above["scores"].tolist() == everything["scores"][:2].tolist()
    (first,) = OnnxDetector(model, detections_per_image=1)([image])
    assert {name: len(values) for name, values in first.items()} == dict.fromkeys(first, 1)


def test_more_detections_than_the_file_returns_are_refused(exported: Any) -> None:
    with pytest.raises(UsageError, match="expected at most 100 detections per image"):
        OnnxDetector(exported[2], detections_per_image=101)


def test_detector_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a model in evaluation mode"):
        export_onnx(small_detector("retinanet").train(), tmp_path / "detector.onnx")


def test_settings_are_those_of_the_detector() -> None:
    expected = DetectionSettings(
        resize=None, rounding="down", score_threshold=0.3, nms_threshold=0.5, detections_per_image=7
    )
    options: dict[str, Any] = {
        "resize": None,
        "resize_rounding": "down",
        "score_threshold": 0.3,
        "detections_per_image": 7,
    }
    for head in HEADS:
        assert detection_settings(small_detector(head, **options)) == expected


@pytest.mark.parametrize("rounding", ["nearest", "down"])
@pytest.mark.parametrize("size", [(50, 121), (300, 200), (64, 128)], ids=str)
def test_runtime_resizes_as_pytorch_does(size: tuple[int, int], rounding: str) -> None:
    pixels = picture(*size)
    settings: Any = detection_settings(small_detector("retinanet", resize_rounding=rounding))
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    if rounding == "nearest":
        expected = resize_rounded(image, 64, 128)
    else:
        factor = min(64 / min(size), 128 / max(size))
        expected = torch.nn.functional.interpolate(
            image[None], scale_factor=factor, mode="bilinear", recompute_scale_factor=True
        )[0]
    found = resize_pixels(pixels, settings).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [(56, 84), (112, 168), (32, 32), (128, 192)], ids=str)
def test_file_rounds_resized_pixels_as_pytorch_does(size: tuple[int, int]) -> None:
    # With these ratios of the sides, many resized pixels of noise are exactly between two 8-bit values.
    detector = small_detector("retinanet")
    axes = (1, "height", "width", 3)
    model = preparation_model(detector.transform, detection_settings(detector), 20, 3, True, axes)
    pixels = torch.randint(
        0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    (batch, *_) = open_session(model.SerializeToString()).run(None, {"pixels": pixels.numpy()})
    expected, _ = detector.transform([pixels[0].permute(2, 0, 1) / 255])
    np.testing.assert_allclose(batch, expected.tensors.numpy(), atol=1e-5)


def test_wrong_detections_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Any
) -> None:
    detector, report, _ = exported
    other = onnx.load(report.path)
    for tensor in other.graph.initializer:
        if "cls_" in tensor.name and tensor.name.endswith("bias"):
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), tensor.name))
    monkeypatch.setattr("lightspine.export.detection.to_detector_onnx", lambda *_, **__: other)
    with pytest.raises(LightspineError, match="no file was written"):
        export_onnx(detector, tmp_path / "other.onnx", with_preprocessing=True, fixed_size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "images"])
def test_file_of_any_size(head: str, member: str, pixels: bool, tmp_path: Path) -> None:
    detector = small_detector(head, member)
    export_onnx(detector, tmp_path / "detector.onnx", with_preprocessing=pixels, shapes=[(1, 64, 96)])
    model, reference = OnnxModel(tmp_path / "detector.onnx"), WholeDetector(detector, pixels)
    for height, width in [(64, 64), (97, 161), (33, 300), (128, 160)]:
        image = torch.from_numpy(picture(height, width))[None]
        given = image if pixels else image.permute(0, 3, 1, 2) / 128 - 1
        with torch.inference_mode():
            expected = dict(zip(model.outputs, reference(given), strict=True))
        actual = dict(zip(model.outputs, map(torch.from_numpy, model.run(given.numpy())), strict=True))
        check_detections(expected, actual)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8-dynamic", "int8-static"])
@pytest.mark.parametrize("head", HEADS)
def test_reduced_precision_is_smaller_and_runs(head: str, precision: Any, tmp_path: Path) -> None:
    Image.fromarray(picture(*SIZE)).save(tmp_path / "calibration.png")
    detector = small_detector(head, channels=32)
    report = export_onnx(
        detector,
        tmp_path / "detector.onnx",
        precision=precision,
        calibration=tmp_path if precision == "int8-static" else None,
        with_preprocessing=True,
        fixed_size=SIZE,
    )
    if precision != "int8-dynamic":
        assert report.bytes < 0.8 * report.weight_bytes
    assert len(OnnxModel(report.path).detect_pixels(picture(*SIZE)))
