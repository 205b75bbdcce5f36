"""`lightspine export` from the command line."""

import json
from pathlib import Path

import pytest

from lightspine.dense import create_detector, save_network
from lightspine_cli.main import main
from lightspine_runtime import OnnxModel
from support.checkpoints import save_small
from support.images import COLOURS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("export") / "model.safetensors", classes=list(COLOURS))


def test_checkpoint_becomes_a_file_that_knows_its_classes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "m.onnx")]) == 0
    assert "relative difference from PyTorch up to 1e-04" in capsys.readouterr().out
    assert OnnxModel(tmp_path / "m.onnx").class_names == list(COLOURS)


def test_json_holds_the_differences(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(checkpoint), str(tmp_path / "m.onnx"), "--fixed-size", "32x48", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [found["shape"] for found in report["differences"]] == [[1, 32, 48], [3, 32, 48]]
    assert report["bytes"] == (tmp_path / "m.onnx").stat().st_size


def test_program_of_pytorch(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "m.pt2"), "--to", "pt2"]) == 0
    assert (tmp_path / "m.pt2").is_file()


def test_random_weights_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "test_resnet", str(tmp_path / "m.pt2"), "--to", "pt2", "--features"]
    assert main(arguments) == 0
    assert "test_resnet is exported with random weights" in capsys.readouterr().err


BAD_CALLS = {
    "unknown model": (["vmamba_tyni", "m.onnx"], "the closest names are vmamba_tiny"),
    "missing checkpoint": (["shvit_s1", "m.onnx", "--checkpoint", "gone.pth"], "no checkpoint file gone.pth"),
    "size in words": (["shvit_s1", "m.onnx", "--fixed-size", "small"], "expected a size such as 224x224"),
    "no images to calibrate": (
        ["shvit_s1", "m.onnx", "--precision", "int8-static"],
        "needs a folder of calibration images, got none",
    ),
    "free size for Core ML": (
        ["shvit_s1", "m.mlpackage", "--to", "coreml"],
        "an export to Core ML needs fixed_size",
    ),
    "unrolled and free": (["shvit_s1", "m.onnx", "--scan", "unrolled"], "expected a fixed size"),
    "opset of the future": (["shvit_s1", "m.onnx", "--opset", "27"], "expected an opset from 18 to 26"),
    "ONNX's options elsewhere": (
        ["shvit_s1", "m.pt2", "--to", "pt2", "--precision", "fp16"],
        "--precision is only for --to onnx, got --to pt2",
    ),
    "a detector's option elsewhere": (
        ["shvit_s1", "m.onnx", "--score-threshold", "0.3"],
        "--score-threshold is for a whole detector in ONNX, got shvit_s1",
    ),
    "classes of a classifier": (
        ["shvit_s1", "m.onnx", "--class-map"],
        "expected a segmenter for a class map",
    ),
    "another ending": (["shvit_s1", "m.bin"], "expected a file name that ends in .onnx"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call_is_one_sentence_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert message in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score-threshold", "2"], "expected a score_threshold from 0 to 1, got 2.0"),
        (["--detections-per-image", "0"], "expected detections_per_image of at least 1, got 0"),
        (["--features", "--resize", "64", "96"], "--resize is for a whole detector in ONNX"),
    ],
)
def test_bad_option_of_a_detector_is_one_sentence(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = create_detector(
        "retinanet", "test_efficientnet", 2, model_args={"out_indices": (2, 3, 4)}, channels=8
    )
    file = save_network(detector.eval(), tmp_path / "detector.safetensors")
    assert main(["export", str(file), str(tmp_path / "m.onnx"), *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "m.onnx").exists()
