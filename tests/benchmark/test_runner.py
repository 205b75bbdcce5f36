"""`lightspine bench MODELS`: interleaved timing, resuming, failures; no durations are asserted."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lightspine.benchmark.groups import gemm_gflops
from lightspine.benchmark.memory import describe_failure
from lightspine.benchmark.model_specs import ModelSpec, parse_model
from lightspine.benchmark.peak_rss import can_measure_memory
from lightspine.benchmark.results import BenchResult, Mode, load_results
from lightspine.benchmark.runner import Destination, bench_models
from lightspine.benchmark.settings import BenchSettings, absent_rows, plan_groups
from lightspine.errors import LightspineError, UsageError
from lightspine_cli.main import main

TOO_MANY = 10**10
"""Images of this batch take more than an address space holds, so the allocator refuses them at once."""

SMALL = BenchSettings(sizes=((64, 64),), threads=1, repeats=3, warmup=1)
TWO_GROUPS = BenchSettings(sizes=((64, 64), (96, 64)), threads=1, repeats=1)


def _specs(*names: str) -> list[ModelSpec]:
    return [parse_model(name) for name in names]


@contextmanager
def _quickly() -> Iterator[None]:
    """Skip the subprocesses that measure memory, which are slow to import everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightspine.benchmark.runner.can_measure_memory", lambda: False)
        yield


@pytest.fixture
def _in_this_process() -> Iterator[None]:
    with _quickly():
        yield


def _ticking() -> Callable[[], float]:
    """Return a fake clock that gives every timed call 20 ms."""
    return (0.02 * tick for tick in itertools.count()).__next__


@pytest.mark.usefixtures("_in_this_process")
def test_times_come_from_the_timed_calls_only() -> None:
    result = bench_models(_specs("shvit_s1"), SMALL, clock=_ticking())
    [row] = result.rows
    assert row.forward is not None
    assert (row.forward.median_ms, row.forward.p90_ms, row.forward.repeats) == pytest.approx((20, 20, 3))
    assert row.forward.first_call_s == pytest.approx(0.02)
    assert row.forward.images_per_s == pytest.approx(50)


@pytest.mark.usefixtures("_in_this_process")
def test_rates_follow_from_multiply_adds_and_median() -> None:
    settings = BenchSettings(sizes=((64, 64),), batches=(2,), threads=1, repeats=3, warmup=1)
    result = bench_models(_specs("vmamba_tiny"), settings, clock=_ticking())
    [row] = result.rows
    assert row.macs is not None
    assert row.macs_scan is not None
    assert 0 < row.macs_scan < row.macs
    assert row.parameters == 30_249_064
    assert row.gflops_per_s == pytest.approx(2 * row.macs * 2 / 0.02 / 1e9)
    # A product of 1024 x 1024 matrices alternates with the model and also takes 20 ms.
    assert result.matmul_gflops == pytest.approx({"float32": 2 * 1024**3 / 0.02 / 1e9})
    assert row.matmul_share == pytest.approx(row.gflops_per_s / result.matmul_gflops["float32"])


@pytest.mark.usefixtures("_in_this_process")
def test_models_modes_and_dtypes_take_turns() -> None:
    turns: list[str] = []
    settings = BenchSettings(
        sizes=((64, 64),),
        threads=1,
        repeats=4,
        warmup=1,
        calls_per_turn=2,
        modes=("eager", "optimized"),
        dtypes=("float32", "bfloat16"),
    )
    names = _specs("shvit_s1", "timm/shvit_s1")
    result = bench_models(names, settings, on_step=lambda text, _: turns.append(text))
    assert [row.status for row in result.rows] == ["ok"] * 8
    timed = [text for text in turns if ": memory" not in text]
    rows = set(timed[:8])
    assert len(rows) == 8
    # After the warm-up, two rounds; in each, every model has one untimed and two timed calls.
    assert len(timed) == 8 + 2 * 8 * 3
    for start in (8, 32):
        turns_of_round = [timed[i : i + 3] for i in range(start, start + 24, 3)]
        assert all(len(set(turn)) == 1 for turn in turns_of_round)
        assert {turn[0] for turn in turns_of_round} == rows


@pytest.mark.usefixtures("_in_this_process")
def test_number_of_planned_steps_is_that_of_the_steps_done() -> None:
    planned, done = [], []
    bench_models(
        _specs("shvit_s1"), SMALL, on_plan=planned.append, on_step=lambda _, steps: done.append(steps)
    )
    assert planned == [sum(done)]


@pytest.mark.usefixtures("_in_this_process")
def test_training_step_is_timed_beside_the_forward_pass() -> None:
    settings = BenchSettings(
        sizes=((64, 64),), batches=(2,), threads=1, repeats=1, warmup=1, train=True,
        modes=("eager", "optimized"), dtypes=("bfloat16",),
    )  # fmt: skip
    eager, optimized = bench_models(_specs("shvit_s1"), settings, clock=_ticking()).rows
    assert eager.train_step is not None
    assert eager.train_step.first_call_s == pytest.approx(0.02)
    assert eager.forward is not None
    # Optimized models have no gradients.
    assert (optimized.train_step, optimized.status) == (None, "ok")


@pytest.mark.usefixtures("_in_this_process")
def test_training_that_fails_leaves_the_forward_pass() -> None:
    # SHViT's last BatchNorm cannot be trained on one image.
    settings = BenchSettings(sizes=((64, 64),), threads=1, repeats=1, train=True)
    [row] = bench_models(_specs("shvit_s1"), settings).rows
    assert (row.status, row.train_step) == ("failed", None)
    assert row.forward is not None
    assert row.error is not None
    assert row.error.startswith("training step: UsageError: training with BatchNorm needs more than one")


def _only(result: BenchResult, **where: Any) -> Any:
    [row] = [row for row in result.rows if all(getattr(row, key) == value for key, value in where.items())]
    return row


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Run the command with a model that fails at this size and a batch that runs out of memory."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    arguments = ["shvit_s1", "timm/efficientformer_l1", "--size", "64", "--batch", f"1,{TOO_MANY}"]
    options = ["--threads", "1", "--repeats", "2", "--warmup", "1", "--out", str(folder)]
    return main(["bench", *arguments, *options]), folder


def test_failures_end_with_status_1(broken_run: tuple[int, Path]) -> None:
    assert broken_run[0] == 1


def test_row_without_enough_memory_says_so(broken_run: tuple[int, Path]) -> None:
    row = _only(load_results(broken_run[1]), model="shvit_s1", batch=TOO_MANY)
    assert (row.status, row.forward) == ("out_of_memory", None)
    assert "memory" in row.error


def test_model_that_cannot_take_the_size_fails_by_itself(broken_run: tuple[int, Path]) -> None:
    result = load_results(broken_run[1])
    row = _only(result, model="efficientformer_l1", batch=1)
    assert (row.source, row.status, row.forward) == ("timm", "failed", None)
    assert row.error.startswith("RuntimeError: ")
    good = _only(result, model="shvit_s1", batch=1)
    assert (good.status, good.forward.repeats) == ("ok", 2)


@pytest.mark.skipif(
    not can_measure_memory(), reason="the system lets no process set its high-water mark back"
)
def test_memory_holds_at_least_the_weights(broken_run: tuple[int, Path]) -> None:
    row = _only(load_results(broken_run[1]), model="shvit_s1", batch=1)
    weights_mib = 4 * row.parameters / 2**20
    # An image of 64 x 64 pixels adds little to them.
    assert weights_mib < row.peak_memory_mib < weights_mib + 8


def test_run_says_how_to_repeat_it(broken_run: tuple[int, Path]) -> None:
    result = load_results(broken_run[1])
    assert result.command[:4] == ["lightspine", "bench", "shvit_s1", "timm/efficientformer_l1"]
    assert result.settings["sizes"] == [[64, 64]]
    assert result.matmul_gflops["float32"] > 0


@pytest.fixture(scope="module")
def half_a_run() -> str:
    """Return the result of a run without its second group, with the first group marked."""
    with _quickly():
        result = bench_models(_specs("shvit_s1"), TWO_GROUPS)
    content = result.as_dict()
    content["rows"] = content["rows"][:1]
    content["rows"][0]["forward"]["median_ms"] = 12345.0
    return json.dumps(content)


@pytest.fixture
def finished(half_a_run: str, tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(half_a_run)
    return tmp_path


@pytest.mark.usefixtures("_in_this_process")
def test_resumed_run_measures_only_what_is_missing(finished: Path) -> None:
    turns: list[str] = []
    result = bench_models(
        _specs("shvit_s1"),
        TWO_GROUPS,
        Destination(folder=finished, resume=True),
        on_step=lambda text, _: turns.append(text),
    )
    assert [(row.height, row.width) for row in result.rows] == [(64, 64), (96, 64)]
    assert result.rows[0].forward is not None
    assert result.rows[0].forward.median_ms == 12345.0
    assert all("96x64" in text for text in turns)
    assert load_results(finished) == result


@pytest.mark.usefixtures("_in_this_process")
def test_run_with_other_settings_is_not_resumed(finished: Path) -> None:
    settings = BenchSettings(sizes=((64, 64), (96, 64)), threads=1, repeats=2)
    with pytest.raises(UsageError, match=r"cannot resume the run in .*: its repeats is 1, this run has 2"):
        bench_models(_specs("shvit_s1"), settings, Destination(folder=finished, resume=True))


@pytest.mark.usefixtures("_in_this_process")
def test_run_of_another_machine_is_not_resumed(finished: Path) -> None:
    file = finished / "results.json"
    content = json.loads(file.read_text())
    content["system"]["processor"] = "an abacus"
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="its processor is an abacus, this run has "):
        bench_models(_specs("shvit_s1"), TWO_GROUPS, Destination(folder=finished, resume=True))


@pytest.mark.usefixtures("_in_this_process")
def test_finished_run_is_not_overwritten_unasked(finished: Path) -> None:
    with pytest.raises(UsageError, match="already holds a result: use --resume to continue it"):
        bench_models(_specs("shvit_s1"), SMALL, Destination(folder=finished))


def test_group_holds_all_that_is_compared_at_one_batch_and_size() -> None:
    settings = BenchSettings(batches=(1, 8), sizes=(None, (96, 64)), modes=("eager", "optimized"))
    groups = plan_groups(_specs("shvit_s1", "efficientvim_m4"), settings)
    assert [{(job.row.batch, job.row.height, job.row.width) for job in group} for group in groups] == [
        # Each at the size that its authors evaluate it at.
        {(1, 224, 224), (1, 256, 256)},
        {(1, 96, 64)},
        {(8, 224, 224), (8, 256, 256)},
        {(8, 96, 64)},
    ]
    assert all(len(group) == 4 for group in groups)


def test_each_model_is_a_group_of_its_own_on_a_gpu() -> None:
    settings = BenchSettings(device="cuda", batches=(128, 1), modes=("eager", "compile"))
    groups = plan_groups(_specs("shvit_s1", "vim_tiny"), settings)
    assert [[(job.row.model, job.row.batch, job.row.mode) for job in group] for group in groups] == [
        [(model, batch, mode) for mode in ("eager", "compile")]
        for batch in (128, 1)
        for model in ("shvit_s1", "vim_tiny")
    ]


def test_absent_model_is_a_row_with_its_reason() -> None:
    spec = ModelSpec(name="EdgeViT-XXS", source="timm", absent="timm has no such model")
    [row] = absent_rows([spec], BenchSettings())
    assert (row.model, row.status, row.error) == ("EdgeViT-XXS", "absent", "timm has no such model")
    assert plan_groups([spec], BenchSettings()) == [[]]


@pytest.mark.usefixtures("_in_this_process")
def test_exported_files_are_not_measured_in_reduced_precision() -> None:
    settings = BenchSettings(threads=1, modes=("onnx",), dtypes=("bfloat16",), sizes=((64, 64),))
    [row] = bench_models(_specs("shvit_s1"), settings).rows
    assert row.status == "absent"
    assert row.error == "mode onnx supports float32 only, got bfloat16"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), ("out_of_memory", "the process could not allocate memory")),
        (torch.OutOfMemoryError("CUDA out of memory."), ("out_of_memory", "CUDA out of memory.")),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            ("out_of_memory", "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        ),
        (RuntimeError("std::bad_alloc"), ("out_of_memory", "std::bad_alloc")),
        (ValueError("wrong\n  size"), ("failed", "ValueError: wrong size")),
        (AssertionError(), ("failed", "AssertionError")),
    ],
)
def test_failure_is_told_in_one_line(error: Exception, expected: tuple[str, str]) -> None:
    assert describe_failure(error) == expected


@pytest.mark.skipif(
    not can_measure_memory(), reason="the system lets no process set its high-water mark back"
)
def test_row_whose_process_the_system_ends_is_out_of_memory() -> None:
    script = (
        "import os, sys, lightspine.benchmark.memory as memory\n"
        "memory._measure_request = lambda request: os.kill(os.getpid(), 9)\n"
        "memory.run_server()\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], input="{}\n{}\n", capture_output=True, text=True, check=True
    )
    # The parent of the fork survives.
    assert told.stdout.splitlines() == ['{"signal": 9}'] * 2


def test_broken_memory_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LightspineError, match="the process that measures memory has ended"):
        bench_models(_specs("shvit_s1"), SMALL)


def test_rate_of_matrix_products_is_that_of_the_median() -> None:
    assert gemm_gflops("cpu", [1.0, 0.02, 0.01]) == pytest.approx(2 * 1024**3 / 0.02 / 1e9)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler and of the exporter
def test_every_mode_runs_and_none_changes_the_multiply_adds() -> None:
    settings = BenchSettings(sizes=((64, 64),), threads=1, repeats=1, warmup=1, modes=get_args(Mode))
    rows = bench_models(_specs("shvit_s1"), settings).rows
    assert [(row.mode, row.status, row.error) for row in rows] == [
        (mode, "ok", None) for mode in settings.modes
    ]
    assert len({row.macs for row in rows}) == 1
