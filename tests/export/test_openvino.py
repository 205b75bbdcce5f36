"""OpenVINO computes the same values from an exported file as ONNX Runtime."""

from pathlib import Path

import numpy as np
import openvino
import pytest

from lightspine.export import export_onnx
from lightspine.export.verification import open_session
from support.exporting import small_model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["shvit", "efficientvim", "efficientmod"])
def test_converted_file_gives_the_same_values(family: str, tmp_path: Path) -> None:
    export_onnx(small_model(family, num_classes=5), tmp_path / "model.onnx", shapes=[(1, 64, 64)])
    images = np.random.default_rng(0).standard_normal((2, 3, 96, 64), dtype=np.float32)
    (expected,) = open_session(tmp_path / "model.onnx").run(None, {"images": images})
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", precision)
    np.testing.assert_allclose(compiled(images)[0], expected, rtol=1e-3, atol=1e-5)
