"""`export_coreml`: usage errors; the conversion itself needs coremltools."""

import importlib.util
from pathlib import Path

import pytest

from lightspine.errors import LightspineError, UsageError
from lightspine.export.coreml_file import export_coreml
from support.exporting import small_model


def test_free_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an export to Core ML needs fixed_size"):
        export_coreml(small_model("shvit"), tmp_path / "m.mlpackage")


@pytest.mark.skipif(importlib.util.find_spec("coremltools") is not None, reason="coremltools is installed")
def test_missing_converter_is_named(tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match="needs coremltools, which is not installed"):
        export_coreml(small_model("shvit"), tmp_path / "m.mlpackage", fixed_size=(64, 64))
