"""All commands: help, one-line error messages, exit statuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightspine_cli.main import COMMANDS, main


def _imported_by(*arguments: str) -> set[str]:
    script = (
        "import contextlib, io, sys\n"
        "from lightspine_cli.main import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): main({list(arguments)!r})\n"
        "print(' '.join(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("list", "--help"), ("train", "--help")])
def test_help_imports_neither_torch_nor_the_library(arguments: tuple[str, ...]) -> None:
    assert not {"torch", "timm", "lightspine", "lightning", "numpy"} & _imported_by(*arguments)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in shown] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: lightspine {command}" in capsys.readouterr().out


def test_help_of_train_fits_a_screen_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 60
    assert "lightspine train --config image_folder --data.root PHOTOS --epochs 20" in shown
    assert all(flag in shown for flag in ("--epochs", "--lr", "--batch-size", "--size", "--help-all"))


def test_version_is_that_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    import lightspine

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightspine {lightspine.__version__}\n"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def _one_sentence(captured: str) -> str:
    lines = captured.splitlines()
    assert len(lines) == 1, captured
    assert lines[0].startswith("lightspine: ")
    return lines[0]


WRONG_USE = {
    "unknown command": (["lits"], "unknown command 'lits'; the closest are list"),
    "command like none": (["zzz"], "unknown command 'zzz'; there are list, info"),
    "unknown option before the command": (["--colour"], "unrecognized arguments: --colour"),
    "unknown option of a command": (["list", "--colour"], "unrecognized arguments: --colour"),
    "missing argument": (["info"], "the following arguments are required: NAME|FILE"),
    "no model matches": (["list", "resnetx*"], "no model matches 'resnetx*'"),
    "unknown model": (
        ["info", "vmamba_tyni"],
        "unknown model 'vmamba_tyni'; the closest names are vmamba_tiny",
    ),
    "unknown timm model": (
        ["info", "resnet18x"],
        "unknown model 'resnet18x'; the closest names are resnet18",
    ),
    "size below the smallest": (["info", "shvit_s1", "--size", "16"], "at least 32 pixels, got 16"),
    "missing checkpoint": (["info", "absent.pth"], "no checkpoint file absent.pth"),
    "missing checkpoint to convert": (
        ["convert", "absent.pth", "out.safetensors"],
        "no checkpoint file absent.pth",
    ),
    "wrong choice": (["convert", "a", "b", "--weights", "best"], "invalid choice: 'best'"),
    "missing checkpoint to predict with": (
        ["predict", "image.png", "--checkpoint", "absent.safetensors"],
        "absent.safetensors does not exist",
    ),
    "missing checkpoint to evaluate": (
        ["evaluate", "--checkpoint", "absent.safetensors", "--data", "digits"],
        "absent.safetensors does not exist",
    ),
    "missing folder to compare on": (
        ["compare", "--data", "absent_folder", "--models", "shvit_s1"],
        "absent_folder is missing",
    ),
    "unknown model to compare": (
        ["compare", "--data", "digits", "--models", "shvit_s1,vmamba_tyni"],
        "unknown model 'vmamba_tyni'; the closest names are vmamba_tiny",
    ),
    "model given twice": (
        ["compare", "--data", "digits", "--models", "shvit_s1,shvit_s1"],
        "expected each model once, got shvit_s1 twice",
    ),
    "train without a recipe": (["train"], "`lightspine recipes` lists them"),
    "recipe that is not there": (["train", "--config", "absent.yaml"], "absent.yaml"),
    "unknown option of train": (["train", "--config", "digits_shvit_s1", "--colour", "3"], "colour"),
}


@pytest.mark.parametrize(("arguments", "part"), WRONG_USE.values(), ids=WRONG_USE.keys())
def test_wrong_use_is_one_sentence_and_status_2(
    arguments: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main(arguments)
    assert part in _one_sentence(capsys.readouterr().err)
    assert status == 2


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut"]
)
def test_damaged_checkpoint_is_one_sentence_and_status_1(
    content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    status = main(["info", str(path)])
    assert "damaged.pth" in _one_sentence(capsys.readouterr().err)
    assert status == 1


def _break_list(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    import lightspine_cli.list_command as command

    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(command, "run", fail)


def test_unexpected_failure_names_its_type_and_the_way_to_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_list(monkeypatch, RuntimeError("first line\nsecond line"))
    assert main(["list"]) == 1
    sentence = _one_sentence(capsys.readouterr().err)
    assert sentence == "lightspine: RuntimeError: first line second line (--debug shows the traceback)"


@pytest.mark.parametrize("arguments", [["--debug", "list"], ["list", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_list(monkeypatch, RuntimeError("broken"))
    assert main(arguments) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_is_one_sentence_and_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_list(monkeypatch, KeyboardInterrupt())
    assert main(["list"]) == 130
    assert _one_sentence(capsys.readouterr().err) == "lightspine: interrupted"


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", ["['--help']", "[]"], ids=["leaves in the parser", "returns"])
def test_reader_that_has_left_is_no_failure_to_report(arguments: str, unbuffered: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    script = f"import sys; from lightspine_cli.main import main; sys.exit(main({arguments}))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        text=True,
        check=False,
    )
    os.close(write_end)
    assert run.stderr == ""


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "lightspine", "lits"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "unknown command 'lits'" in run.stderr
