"""The two wheels: lightspine-runtime installs and runs alone, and lightspine does not contain it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import lightspine
import lightspine_runtime
from lightspine.export import export_onnx
from support.checkpoints import save_small
from support.images import COLOURS, write_image

ROOT = Path(__file__).parents[2]
# Otherwise PYTHONPATH would shadow the installed package.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build_wheel(project: Path, folder: Path) -> Path:
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(project)], folder)
    else:
        _run(["uv", "build", "--quiet", "--wheel", "--out-dir", str(folder), str(project)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _install(wheel: Path, python: Path) -> None:
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        command = [*pip, "--python", str(python), "install", str(wheel)]
    else:
        command = ["uv", "pip", "install", "--quiet", "--python", str(python), str(wheel)]
    _run(command, wheel.parent)


def _contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pip") is None and shutil.which("uv") is None, reason="needs pip or uv"
)


@pytest.fixture(scope="module")
def runtime_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_wheel(ROOT / "runtime", tmp_path_factory.mktemp("runtime_wheel"))


@pytest.fixture(scope="module")
def runtime_python(runtime_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment in which only lightspine-runtime was installed."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    _install(runtime_wheel, python)
    return python


def test_versions_are_the_same() -> None:
    assert lightspine_runtime.__version__ == lightspine.__version__


def test_runtime_wheel_contains_its_package_only(runtime_wheel: Path) -> None:
    source = ROOT / "runtime" / "src"
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.suffix in (".py", ".typed")}
    assert _contents(runtime_wheel) == files


def test_lightspine_wheel_contains_no_runtime(tmp_path: Path) -> None:
    packages = {name.partition("/")[0] for name in _contents(_build_wheel(ROOT, tmp_path))}
    assert packages == {"lightspine", "lightspine_cli"}


def test_runtime_brings_onnxruntime_and_no_torch(runtime_python: Path, tmp_path: Path) -> None:
    script = "from importlib.metadata import distributions; print(*(d.name.lower() for d in distributions()))"
    installed = set(_run([str(runtime_python), "-c", script], tmp_path).split())
    assert installed >= {"lightspine-runtime", "onnxruntime", "numpy", "pillow"}
    assert not installed & {"torch", "timm", "torchvision", "lightspine"}


def test_installed_runtime_predicts_as_the_checkpoint_does(runtime_python: Path, tmp_path: Path) -> None:
    save_small(tmp_path / "model.safetensors", classes=list(COLOURS))
    model, saved = lightspine.load_model(tmp_path / "model.safetensors")
    export_onnx(
        model,
        tmp_path / "model.onnx",
        class_names=saved.class_names,
        preprocessing=saved.preprocessing,
        shapes=[(1, 32, 32)],
    )
    image = write_image(tmp_path / "a.png", (9, 99, 200), size=(50, 40))
    script = (
        "import json; from lightspine_runtime import predict\n"
        f"(found,) = predict('model.onnx', [{str(image)!r}], topk=3)\n"
        "print(json.dumps({score.name: score.probability for score in found.classes}))"
    )
    found = json.loads(_run([str(runtime_python), "-c", script], tmp_path))
    (expected,) = lightspine_runtime.predict(tmp_path / "model.onnx", [image], topk=3)
    assert found == {score.name: pytest.approx(score.probability) for score in expected.classes}
