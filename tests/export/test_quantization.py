"""Quantization and half precision: smaller files, float32 scans, same predictions."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from lightspine.errors import UsageError
from lightspine.export import export_onnx
from lightspine.export.verification import compare, random_batches, session_function
from lightspine_runtime import OnnxModel
from support.exporting import small_model
from support.images import write_folder


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("shvit", {}),
        pytest.param("vmamba", {}, marks=pytest.mark.slow),
        pytest.param("vim", {}, marks=pytest.mark.slow),
        pytest.param("vim", {"directions": "v1"}, marks=pytest.mark.slow),
    ],
    ids=["shvit", "vmamba", "vim", "vim v1"],
)
def test_half_precision_halves_the_file(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(family, num_classes=1000, **options)
    report = export_onnx(model, tmp_path / "half.onnx", precision="fp16", shapes=[(1, 64, 96)])
    assert 0.01 < report.bytes / report.weight_bytes < (0.6 if family == "shvit" else 1.2)
    # Half precision has 11 bits; a half-precision scan would be far less accurate.
    assert report.differences[0].relative < 5e-3
    # The float32 scans of the file have compiled kernels.
    compiled = OnnxModel(report.path)
    assert compiled.compiled_scans == (family != "shvit")
    run = session_function(compiled.session)
    assert compare(model, run, random_batches(3, [(1, 64, 96)]))[0].relative < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["efficientmod", "efficientvim", "vim", "vmamba"])
def test_matrix_products_in_8_bit(family: str, tmp_path: Path) -> None:
    report = export_onnx(
        small_model(family), tmp_path / "m.onnx", precision="int8-dynamic", shapes=[(1, 64, 96)]
    )
    operators = {node.op_type for node in onnx.load(report.path).graph.node}
    assert "MatMulInteger" in operators or "DynamicQuantizeMatMul" in operators
    assert report.differences[0].relative < 0.2


def test_static_quantisation_does_convolutions_in_8_bit(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", count=4)
    model = small_model("shvit", stem_stride=4)
    report = export_onnx(
        model, tmp_path / "m.onnx", precision="int8-static", calibration=images, fixed_size=(64, 64)
    )
    operators = [node.op_type for node in onnx.load(report.path).graph.node]
    assert operators.count("QuantizeLinear") > operators.count("Conv") > 0
    assert report.bytes < 0.5 * report.weight_bytes


@pytest.mark.parametrize(("folder", "message"), [("absent", "is not a folder"), ("empty", "contains none")])
def test_calibration_without_images_is_refused(folder: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        export_onnx(
            small_model("shvit"), tmp_path / "m.onnx", precision="int8-static", calibration=tmp_path / folder
        )
