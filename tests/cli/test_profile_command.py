"""`lightspine profile`: output, files and usage errors."""

import json
from pathlib import Path

import pytest

from lightspine_cli.main import main

QUICK = ["--size", "64", "--threads", "1", "--repeats", "1"]


def test_lists_modules_operators_and_share_of_the_scans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "vim_tiny", *QUICK, "--top", "3", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "images        1 x 64 x 64" in shown
    assert "(the model)" in shown
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert 0 < profile["scan_share"] < 1
    assert profile["modules"][0]["name"] == ""
    assert profile["settings"]["size"] == [64, 64]
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any(event.get("name") == "lightspine::selective_scan" for event in trace["traceEvents"])


def test_training_step_has_a_backward(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "shvit_s1", *QUICK, "--batch", "2", "--train", "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)
    assert any(
        operator["name"] == "aten::convolution_backward" for operator in profile["operators"]["operators"]
    )
    assert profile["scan_share"] == 0


def test_model_of_timm_is_profiled_in_its_fused_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "timm/mobileone_s0", *QUICK, "--mode", "optimized", "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)
    # After fusion its blocks have one convolution and no BatchNorm.
    assert not any("BatchNorm" in module["kind"] for module in profile["modules"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["shvit_s9"], "unknown model 'shvit_s9'"),
        (["shvit_s1", "--size", "big"], "expected a size such as 224 or 448x672, got 'big'"),
        (["shvit_s1", "--size", "16"], "at least 32 x 32 pixels, got 16 x 16"),
        (
            ["shvit_s1", "--train", "--mode", "optimized"],
            "expected mode eager for a training step, got optimized",
        ),
        (["shvit_s1", "--dtype", "int8"], "expected dtypes from float32, bfloat16, float16, got int8"),
        (["shvit_s1", "--top", "0"], "--top must be at least 1, got 0"),
        (["shvit_s1", "--mode", "onnx"], "invalid choice: 'onnx'"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert part in lines[0]
