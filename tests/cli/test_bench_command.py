"""`lightspine bench`: output and usage errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.benchmark.results import load_results
from lightspine_cli import bench_command
from lightspine_cli.main import main
from support.images import write_folder

TINY = ["bench", "ops", "--shapes", "vmamba-4", "--batch", "1", "--threads", "1", "--repeats", "1"]


def test_json_holds_settings_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--parts", "time", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["threads"], report["repeats"]) == (1, 1)
    assert [(row["case"]["name"], row["batch"], row["memory"]) for row in report["rows"]] == [
        ("vmamba-4", 1, None)
    ]
    assert report["system"]["versions"]["torch"]


def test_table_of_ops_compares_backends_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--parts", "time,memory"]) == 0
    shown = capsys.readouterr().out
    assert "\nvmamba-4 " in shown
    for column in ("elementwise ms", "reference x", "torch x", "/ forward"):
        assert column in shown
    assert "target" not in shown


def test_help_of_ops_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--shapes", "--batch", "--threads", "--repeats", "--json"))


def test_table_of_data_loading_has_decoding_and_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_folder(tmp_path / "images", count=4, splits=("train", "val")))
    options = ["--size", "32", "--batch", "4", "--images", "8", "--workers", "0"]
    assert main(["bench", "data", folder, *options]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith(("decode ", "load "))]
    assert [row[:3] for row in rows if row[1] == "0"] == [["decode", "0", "8"], ["load", "0", "8"]]
    assert "images/s per core" in shown


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["bench"], "ops"),
        (["bench", "model-of-nobody"], "unknown model 'model-of-nobody'"),
        (["bench", "shvit_s1", "--size", "224x"], "expected a size such as 224 or 448x672, got '224x'"),
        (["bench", "shvit_s1", "--size", "16"], "at least 32 x 32 pixels, got 16 x 16"),
        (["bench", "shvit_s1", "--batch", "0"], "must be at least 1, got [0]"),
        (["bench", "shvit_s1", "--mode", "fast"], "expected modes from eager, optimized, compile, onnx"),
        (["bench", "shvit_s1", "--dtype", "int4"], "expected dtypes from float32, bfloat16, float16"),
        (["bench", "shvit_s1", "--device", "abacus"], "expected devices from cpu, cuda, got abacus"),
        (["bench", "shvit_s1", "--resume"], "expected --out with the folder of the run to resume"),
        (["bench", "--preset", "vim-resolutions"], "the closest are vim-resolution"),
        (
            ["bench", "--preset", "gpu-table", "--only", "resnet18"],
            "preset gpu-table, vmamba_tiny, timm/swin",
        ),
        (["bench", "shvit_s1", "--only", "shvit_s1"], "--only selects models of a preset"),
        (["bench", "ops", "--shapes", "vmamba-9"], "got vmamba-9"),
        (["bench", "ops", "--batch", "one"], "expected numbers such as 1,8, got 'one'"),
        (["bench", "ops", "--batch", "0"], "must be at least 1, got 0"),
        (["bench", "ops", "--parts", "speed"], "got speed"),
        (["bench", "data", "nowhere"], "nowhere"),
        (["bench", "data", "nowhere", "--images", "100"], "at least two batches of 64 images, got 100"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert part in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_table_of_a_gpu_without_one_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--preset", "gpu-table", "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "device 'cuda' is not available" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_table_of_a_gpu_runs_on_a_cpu_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightspine.benchmark.runner.can_measure_memory", lambda: False)
    arguments = ["--device", "cpu", "--only", "shvit_s1,timm/shvit_s1", "--batch", "2", "--size", "64"]
    arguments += ["--mode", "eager", "--repeats", "2", "--warmup", "1", "--threads", "1"]
    assert main(["bench", "--preset", "gpu-table", *arguments, "--out", str(tmp_path)]) == 0
    rows = load_results(tmp_path).rows
    assert [(row.source, row.dtype, row.batch, row.status) for row in rows] == [
        ("lightspine", "bfloat16", 2, "ok"),
        ("timm", "bfloat16", 2, "ok"),
    ]
    for row in rows:
        assert row.forward is not None
        assert row.forward.p99_ms is not None
        assert row.train_step is not None
        assert row.matmul_share is not None
        assert row.matmul_share > 0
    assert "train images/s" in capsys.readouterr().out


def test_list_of_presets_tells_how_many_models_each_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list-presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [steps] = [line.split() for line in lines if line.startswith("vmamba-steps")]
    assert steps[:3] == ["vmamba-steps", "11", "1"]


def test_help_names_the_options_and_the_other_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("--preset", "--size", "--mode", "--resume", "bench ops"):
        assert word in shown


def test_table_of_models_shows_measured_beside_published(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The subprocesses that measure memory are slow to import everything.
    monkeypatch.setattr("lightspine.benchmark.runner.can_measure_memory", lambda: False)
    arguments = [
        "shvit_s1",
        "--threads",
        "1",
        "--repeats",
        "1",
        "--mode",
        "eager,onnx",
        "--dtype",
        "bfloat16",
    ]
    assert main(["bench", *arguments]) == 0
    shown = capsys.readouterr().out
    measured, why = shown.split("not measured")
    cells = measured.splitlines()[-2].split()
    assert cells[:6] == ["shvit_s1", "lightspine", "eager", "bfloat16", "1", "224x224"]
    assert cells[-2:] == ["72.8", "33489"]
    assert "absent   mode onnx supports float32 only, got bfloat16" in why


def test_deprecated_export_benchmark_warns_and_runs_the_model_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, list[str]]] = []
    monkeypatch.setattr(
        bench_command, "_run_models", lambda args, arguments: calls.append((args, arguments)) or 0
    )
    options = ["--models", "shvit_s1,vim_tiny", "--batch", "1", "--threads", "1", "--out", "runs/speed.json"]
    with pytest.warns(
        FutureWarning, match="use `lightspine bench shvit_s1 vim_tiny --mode eager,optimized,onnx"
    ):
        assert main(["bench", "export", *options]) == 0
    [(args, arguments)] = calls
    assert args.models == ["shvit_s1", "vim_tiny"]
    assert args.mode == ("eager", "optimized", "onnx")
    assert (args.batch, args.threads, args.out) == ((1,), 1, Path("runs/speed"))
    assert arguments[:2] == ["shvit_s1", "vim_tiny"]


def test_deprecated_export_benchmark_measures_the_small_models_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(bench_command, "_run_models", lambda args, _: calls.append(args) or 0)
    with pytest.warns(FutureWarning, match="`lightspine bench export` is deprecated"):
        assert main(["bench", "export"]) == 0
    assert {"shvit_s1", "timm/shvit_s1", "vmamba_tiny"} <= set(calls[0].models)
    assert calls[0].batch == (1, 8)
