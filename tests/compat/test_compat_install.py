"""Modules under the names of mamba_ssm, causal_conv1d and VMamba's extensions; scripts that import them."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightspine import compat
from lightspine.compat.__main__ import main
from lightspine.compat.modules import MODULES, packages


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    compat.uninstall()
    yield
    compat.uninstall()
    for name in [key for key in sys.modules if key.partition(".")[0] in packages()]:
        del sys.modules[name]


def write_package(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(folder)


def test_import_of_lightspine_installs_nothing() -> None:
    assert not set(packages()) & set(sys.modules)
    assert importlib.util.find_spec("mamba_ssm") is None


def test_missing_packages_are_replaced_and_named() -> None:
    replaced = compat.install()
    assert [name for name, _ in replaced] == packages()
    assert str(replaced[0]) == "mamba_ssm: replaced by lightspine.compat (not installed)"
    assert set(MODULES) <= set(sys.modules)
    assert compat.install() == []


@pytest.mark.parametrize("name", MODULES)
def test_module_has_a_spec_and_its_content(name: str) -> None:
    compat.install()
    module = importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec is module.__spec__
    assert spec.name == name
    for key, value in MODULES[name].items():
        assert getattr(module, key) is value
    assert importlib.reload(module) is module


@pytest.mark.parametrize(
    "statement",
    [
        "from mamba_ssm import Mamba",
        "from mamba_ssm.modules.mamba_simple import Mamba, Block",
        "import mamba_ssm; mamba_ssm.ops.triton.layer_norm.RMSNorm",
        "from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn",
        "from mamba_ssm.ops import selective_scan_interface",
        "from mamba_ssm.ops.triton.selective_state_update import selective_state_update",
        "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update",
        "import selective_scan_cuda_oflex; selective_scan_cuda_oflex.fwd",
    ],
)
def test_import_statements_of_models(statement: str) -> None:
    compat.install()
    exec(statement, {})


@pytest.mark.parametrize(
    ("statement", "error", "message"),
    [
        (
            "from mamba_ssm import Mamba2",
            ImportError,
            "lightspine's mamba_ssm has no 'Mamba2': it has Mamba, mamba_inner_fn, selective_scan_fn, "
            "mamba_ssm.modules, mamba_ssm.ops, mamba_ssm.utils",
        ),
        (
            "import mamba_ssm; mamba_ssm.Mamba2",
            AttributeError,
            "lightspine's mamba_ssm has no 'Mamba2': it has Mamba, ",
        ),
        (
            "from mamba_ssm.modules.mamba2 import Mamba2",
            ModuleNotFoundError,
            "lightspine's mamba_ssm.modules has no 'mamba2': it has mamba_ssm.modules.mamba_simple",
        ),
        (
            "from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref",
            ImportError,
            "lightspine's causal_conv1d.causal_conv1d_interface has no 'causal_conv1d_ref': it has "
            "causal_conv1d_fn, causal_conv1d_update",
        ),
    ],
)
def test_what_is_missing_is_said_with_what_exists(
    statement: str, error: type[Exception], message: str
) -> None:
    compat.install()
    with pytest.raises(error) as caught:
        exec(statement, {})
    assert str(caught.value).startswith(message)


def test_probing_for_an_attribute_does_not_fail() -> None:
    compat.install()
    assert not hasattr(importlib.import_module("mamba_ssm"), "Mamba2")


WORKING = """
def causal_conv1d_fn(x, weight):
    return x
"""


def test_a_working_package_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "causal_conv1d", WORKING, monkeypatch)
    assert "causal_conv1d" not in [name for name, _ in compat.install()]
    assert importlib.import_module("causal_conv1d").__file__ == str(
        tmp_path / "causal_conv1d" / "__init__.py"
    )


def test_override_replaces_a_working_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "causal_conv1d", WORKING, monkeypatch)
    compat.install()
    assert [(r.name, r.reason) for r in compat.install(override=True)] == [("causal_conv1d", "override=True")]
    assert importlib.import_module("causal_conv1d").causal_conv1d_update


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_nobody_has", "No module named 'a_module_that_nobody_has'"),
        ("raise OSError('libcudart.so.12: cannot open')", "libcudart.so.12: cannot open"),
        (
            "def causal_conv1d_fn(x, weight):\n    raise RuntimeError('x.is_cuda() is false\\nmore')",
            "x.is_cuda() is false",
        ),
    ],
)
def test_a_broken_package_is_replaced(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path, "causal_conv1d", source, monkeypatch)
    reasons = dict(compat.install())
    assert reasons["causal_conv1d"] == f"installed, but does not work here: {reason}"
    assert importlib.import_module("causal_conv1d").causal_conv1d_update


def test_uninstall_gives_the_names_back() -> None:
    compat.install()
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError, match="No module named 'mamba_ssm'"):
        importlib.import_module("mamba_ssm")


def test_script_runs_with_the_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "neighbor.py").write_text("from mamba_ssm import Mamba\n")
    script = tmp_path / "train.py"
    script.write_text("import sys, neighbor\nprint(__name__, neighbor.Mamba.__name__, sys.argv[1:])\n")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", ["lightspine.compat", str(script), "--epochs", "3"])
    main()
    said = capsys.readouterr()
    assert said.out == "__main__ Mamba ['--epochs', '3']\n"
    assert said.err.splitlines()[0] == "mamba_ssm: replaced by lightspine.compat (not installed)"


def test_missing_script_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightspine.compat", "absent.py"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: no such script: absent.py\n")
