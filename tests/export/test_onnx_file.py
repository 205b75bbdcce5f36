"""`export_onnx`: ONNX Runtime matches PyTorch at any image size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine.export import ExportReport, export_onnx
from lightspine.export.verification import compare, open_session, random_batches, session_function
from lightspine.heads import FeatureBackbone, build_detector, build_segmenter
from lightspine.optimize import optimize
from lightspine_runtime import OnnxModel
from support.dense import MEMBERS
from support.exporting import FAMILIES, disturb, small_model

# Largest relative difference of float32 sums in different order.
TOLERANCE = 1e-5
SHAPES = [(1, 224, 224), (3, 192, 256), (1, 97, 161), (3, 32, 32)]


def backbone(family: str) -> FeatureBackbone:
    name, sizes = MEMBERS[family]
    return FeatureBackbone(lightspine.create_model(name, features_only=True, **sizes))


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model of each family with its exported file."""
    model = small_model(request.param, num_classes=5)
    path = tmp_path_factory.mktemp("exported") / f"{request.param}.onnx"
    report = export_onnx(model, path, class_names=list("abcde"), shapes=[(1, 64, 64)])
    return model, report


def check(model: nn.Module, path: Path, *shapes: tuple[int, int, int]) -> None:
    for found in compare(model, session_function(open_session(path)), random_batches(3, shapes)):
        assert found.relative < TOLERANCE, found


def test_file_gives_pytorch_s_values_at_any_batch_and_size(exported: tuple[nn.Module, ExportReport]) -> None:
    model, report = exported
    check(model, report.path, *SHAPES)


def test_file_has_standard_operators_and_scans_as_functions(exported: tuple[nn.Module, ExportReport]) -> None:
    path = exported[1].path
    content = onnx.load(path)
    onnx.checker.check_model(content, full_check=True)
    domains = {entry.domain: entry.version for entry in content.opset_import}
    if path.stem not in ("vmamba", "vim"):
        assert (domains, len(content.functions)) == ({"": 20}, 0)
        return
    assert domains == {"": 20, "lightspine": 1}
    assert {node.domain for function in content.functions for node in function.node} == {""}
    # One function for all blocks of a kind, not one per call.
    called = {node.op_type for node in content.graph.node if node.domain == "lightspine"}
    assert called == {function.name for function in content.functions}


def test_compiled_scans_give_the_values_of_the_loops(exported: tuple[nn.Module, ExportReport]) -> None:
    model, path = exported[0], exported[1].path
    compiled = OnnxModel(path)
    assert compiled.compiled_scans == (path.stem in ("vmamba", "vim"))
    run = session_function(compiled.session)
    for found in compare(model, run, random_batches(3, [(1, 97, 61), (3, 32, 32), (2, 64, 64)])):
        assert found.relative < TOLERANCE, found


def test_inlined_scans_leave_no_function(tmp_path: Path) -> None:
    export_onnx(small_model("vim", depth=1), tmp_path / "m.onnx", scan="inlined", fixed_size=(32, 32))
    content = onnx.load(tmp_path / "m.onnx")
    assert ([entry.domain for entry in content.opset_import], len(content.functions)) == ([""], 0)


def test_file_holds_no_path_of_the_machine(exported: tuple[nn.Module, ExportReport]) -> None:
    content = exported[1].path.read_bytes()
    assert b".py" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


def test_runtime_has_nothing_to_warn_of(exported: tuple[nn.Module, ExportReport]) -> None:
    # In a subprocess, because ONNX Runtime bypasses Python's standard error.
    script = f"import onnxruntime; onnxruntime.InferenceSession({str(exported[1].path)!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_file_says_what_it_is(exported: tuple[nn.Module, ExportReport]) -> None:
    model, report = exported
    entries = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    assert entries["lightspine.model"] == model.init_args["name"]
    assert json.loads(entries["lightspine.class_names"]) == list("abcde")
    assert json.loads(entries["lightspine.preprocessing"])["input_size"] == [3, 224, 224]
    assert entries["lightspine.version"] == lightspine.__version__


def test_axes_are_named(exported: tuple[nn.Module, ExportReport]) -> None:
    session = open_session(exported[1].path)
    assert (session.get_inputs()[0].name, session.get_inputs()[0].shape) == (
        "images",
        ["batch", 3, "height", "width"],
    )
    assert session.get_outputs()[0].name == "logits"
    assert session.get_outputs()[0].shape[1] == 5


def test_model_stays_as_it_is(exported: tuple[nn.Module, ExportReport]) -> None:
    model, report = exported
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert report.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
# VMamba's first version scans 16 states; its base takes ten minutes.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", lightspine.list_models())
def test_registered_model_in_a_file(name: str, tmp_path: Path) -> None:
    model = disturb(lightspine.create_model(name))
    shapes = [(1, 224, 224), (3, 192, 256), (3, 97, 161), (1, 97, 161)]
    report = export_onnx(model, tmp_path / "model.onnx", shapes=shapes)
    assert [found.shape for found in report.differences] == shapes
    assert max(found.relative for found in report.differences) < TOLERANCE
    assert report.bytes < 1.03 * report.weight_bytes


@pytest.mark.parametrize(
    "family", ["shvit", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[:3])]
)
def test_features_only_model_gives_its_maps(family: str, tmp_path: Path) -> None:
    model = small_model(family, features_only=True, out_indices=(0, 1))
    export_onnx(model, tmp_path / "maps.onnx", shapes=[(1, 64, 64)])
    session = open_session(tmp_path / "maps.onnx")
    count = len(model.feature_info.channels())
    assert [value.name for value in session.get_outputs()] == [f"map{i}" for i in range(count)]
    check(model, tmp_path / "maps.onnx", (1, 64, 96), (2, 97, 65))


def dense_cases(*heads: str, slow: str = "") -> list[Any]:
    """Every backbone with every head; all but SHViT's, and those of the head `slow`, are marked slow."""
    return [
        pytest.param(family, head, marks=() if family == "shvit" and head != slow else pytest.mark.slow)
        for family in MEMBERS
        for head in heads
    ]


# The file of a whole detector (test_detector_file.py) has the pyramid, too.
@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), dense_cases("retinanet", "mask_rcnn"))
def test_detector_gives_its_pyramid(family: str, head: Any, tmp_path: Path) -> None:
    detector = disturb(build_detector(head, backbone(family), 3, channels=16))
    export_onnx(detector.backbone, tmp_path / "pyramid.onnx", shapes=[(1, 64, 64)])

    class Levels(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(detector.backbone(images).values())

    check(Levels(), tmp_path / "pyramid.onnx", (1, 64, 96), (2, 128, 160))


@pytest.mark.parametrize(("family", "head"), dense_cases("semantic_fpn", "upernet", slow="upernet"))
def test_segmenter_gives_its_logits(family: str, head: Any, tmp_path: Path) -> None:
    segmenter = disturb(build_segmenter(head, backbone(family), 3, channels=16))
    export_onnx(segmenter, tmp_path / "segmenter.onnx", shapes=[(1, 64, 64)])
    check(segmenter, tmp_path / "segmenter.onnx", (1, 64, 96), (2, 97, 161))


def test_segmenter_gives_the_class_of_every_pixel(tmp_path: Path) -> None:
    segmenter = disturb(build_segmenter("semantic_fpn", backbone("shvit"), 3, channels=16))
    path = tmp_path / "classes.onnx"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        # Random weights would give all pixels the same class.
        segmenter.decoder.classifier.bias -= segmenter(images).mean((0, 2, 3))
        expected = segmenter(images).argmax(1)[0]
    export_onnx(segmenter, path, class_map=True, with_preprocessing=True, fixed_size=(64, 80))
    (found,) = OnnxModel(path).segment([tmp_path / "a.png"])
    assert len(expected.unique()) > 1
    assert (found == expected.numpy()).mean() > 0.999


def test_class_map_of_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a segmenter for a class map, got a SHViT"):
        export_onnx(small_model("shvit"), tmp_path / "m.onnx", class_map=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vim", "vmamba"])
def test_unrolled_scan_has_no_loop(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    export_onnx(model, tmp_path / "unrolled.onnx", scan="unrolled", fixed_size=(64, 48))
    content = onnx.load(tmp_path / "unrolled.onnx")
    assert not {"Scan", "Loop", "If"} & {node.op_type for node in content.graph.node}
    check(model, tmp_path / "unrolled.onnx", (1, 64, 48), (3, 64, 48))


def test_preprocessing_inside_takes_pixels(tmp_path: Path) -> None:
    model = small_model("shvit")
    export_onnx(model, tmp_path / "pixels.onnx", with_preprocessing=True, shapes=[(1, 64, 64)])
    session = open_session(tmp_path / "pixels.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    cfg = model.pretrained_cfg
    images = (torch.from_numpy(pixels) / 255 - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    with torch.inference_mode():
        expected = model(images.permute(0, 3, 1, 2))
    actual = session.run(None, {"pixels": pixels})[0]
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


def test_wrong_values_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("shvit")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there before")
    # Simulate wrong folding: the exported network differs from the one it is compared with.
    monkeypatch.setattr(
        "lightspine.export.onnx_file.optimize", lambda _: optimize(small_model("shvit", depths=(2, 2)))
    )
    with pytest.raises(LightspineError, match=r"differs from PyTorch by .* no file was written"):
        export_onnx(model, path, fixed_size=(32, 32))
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


BAD_OPTIONS = {
    "another name": ("model.pt", {}, r"ends in \.onnx, got 'model\.pt'"),
    "opset too new": ("m.onnx", {"opset": 27}, "expected an opset from 18 to 26, got 27"),
    "opset too old": ("m.onnx", {"opset": 11}, "expected an opset from 18 to 26, got 11"),
    "unknown precision": (
        "m.onnx",
        {"precision": "int4"},
        "expected a precision of fp32, .* got 'int4'",
    ),
    "no calibration": (
        "m.onnx",
        {"precision": "int8-static"},
        "needs a folder of calibration images, got none",
    ),
    "useless calibration": (
        "m.onnx",
        {"calibration": "."},
        "are for the precision int8-static only, got them with fp32",
    ),
    "free size unrolled": ("m.onnx", {"scan": "unrolled"}, "expected a fixed size"),
    "fixed size too small": ("m.onnx", {"fixed_size": (16, 64)}, "at least 32x32 px, got 16x64"),
    "a folder": ("folder.onnx", {}, "expected a file to write, got the folder"),
}


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option_is_refused_before_any_work(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match=message):
        export_onnx(nn.Identity(), tmp_path / name, **options)


def test_path_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LightspineError, match="cannot write"):
        export_onnx(nn.Identity(), tmp_path / "file" / "model.onnx")


def test_model_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a model in evaluation mode"):
        export_onnx(small_model("shvit").train(), tmp_path / "model.onnx")


def test_module_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a classifier, .* got a Identity"):
        export_onnx(nn.Identity().eval(), tmp_path / "model.onnx")
