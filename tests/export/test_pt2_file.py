"""`export_pt2` and torch.compile match the model's outputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightspine
from lightspine.errors import UsageError
from lightspine.export.pt2_file import METADATA_FILE, export_pt2
from support.exporting import FAMILIES, small_model
from support.reference import relative_l2


@pytest.mark.parametrize(
    "family", ["vim", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "vim")]
)
def test_program_gives_the_model_s_values_at_any_size(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    report = export_pt2(model, tmp_path / "model.pt2", shapes=[(3, 97, 161)])
    assert report.differences[0].relative < 1e-5
    files = {METADATA_FILE: ""}
    program = torch.export.load(report.path, extra_files=files).module()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert relative_l2(program(images), model(images)) < 1e-5
    assert json.loads(files[METADATA_FILE])["lightspine.model"] == model.init_args["name"]


@pytest.mark.slow
def test_unrolled_program_runs_without_the_library(tmp_path: Path) -> None:
    export_pt2(small_model("vim"), tmp_path / "model.pt2", scan="unrolled", fixed_size=(64, 64))
    script = (
        "import sys, torch\n"
        f"program = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()\n"
        "print(tuple(program(torch.zeros(2, 3, 64, 64)).shape), 'lightspine' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(2, 1000) False"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_copy_gives_the_same_values(family: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    model = small_model(family)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(lightspine.optimize(model), fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative_l2(compiled(images), model(images)) < 1e-5


def test_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are operators or unrolled, got loop"):
        export_pt2(small_model("shvit"), tmp_path / "model.pt2", scan="loop")
