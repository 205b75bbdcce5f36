"""The benchmark of the operators on a CUDA device, with a fake device that runs on the CPU."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightspine.benchmark import ops_cuda
from lightspine.benchmark.ops_cases import CASES, ScanCase
from lightspine.benchmark.ops_cuda import (
    FORWARD,
    FORWARD_BACKWARD,
    OPERATORS,
    CudaDevice,
    measure_cuda_ops,
    plan_rows,
)
from lightspine.errors import UsageError
from lightspine_cli.main import main

MAP = ScanCase(name="map", dim=8, height=2, width=3, state_dim=1, directions=4)
SEQUENCE = ScanCase(name="sequence", dim=8, height=1, width=5, state_dim=4, directions=0)
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class FakeDevice:
    """Runs on the CPU; every call takes two milliseconds and 4 KiB."""

    name = "fake"
    torch_device = torch.device("cpu")
    special_functions_per_s = 1e6
    copy_bytes = 1000

    def seconds(self, function: Callable[[], object]) -> float:
        function()
        return 0.002

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, function: Callable[[], object]) -> int:
        function()
        return 4096

    def copy(self) -> object:
        return None


def measure(case: ScanCase, **options: Any) -> dict[str, ops_cuda.CudaRow]:
    report = measure_cuda_ops(plan_rows([case], [2], ["float32"]), FakeDevice(), repeats=3, **options)
    assert [row.error for row in report.rows] == [None] * len(report.rows)
    return {row.operator: row for row in report.rows}


def test_rows_are_those_of_the_published_shapes() -> None:
    found = {(row.case.name, row.batch) for row in plan_rows(CASES)}
    maps = {(f"vmamba-{stage}", batch) for stage in (1, 2, 3, 4) for batch in (128, 1)}
    assert found == maps | {("vim-197", 128), ("vim-1025", 16), ("vim-6085", 8), ("vim-6085", 1)}


def test_floors_of_a_scan_follow_from_its_sizes() -> None:
    row = measure(MAP)["cross_scan"]
    numbers = 2 * 6 * (8 + 4 * 8 + 2 * 4) + 4 * 8 * 3  # x, delta, B and C, and the parameters
    assert (row.input_bytes, row.output_bytes) == (4 * numbers, 4 * 2 * 6 * 8)
    # 2000 bytes in 2 ms are a byte in a microsecond.
    assert row.copy_floor_ms[FORWARD] == pytest.approx((row.input_bytes + row.output_bytes) / 1000)
    moved = 3 * row.input_bytes + 2 * row.output_bytes
    assert row.copy_floor_ms[FORWARD_BACKWARD] == pytest.approx(moved / 1000)
    # Softplus takes two special functions, and the only state one.
    assert row.special_function_floor_ms[FORWARD] == pytest.approx(2 * 6 * 32 * 3 / 1000)
    assert row.special_function_share(FORWARD) == pytest.approx(2 * 6 * 32 * 3 / 1000 / 2)


@pytest.mark.parametrize(
    ("operator", "count"),
    [("selective_scan", 6 + 2), ("bidirectional_scan", 2 * 6 + 2), ("causal_conv1d", 4)],
)
def test_special_functions_of_sequences_per_channel_and_position(operator: str, count: int) -> None:
    assert OPERATORS[operator].special_functions(SEQUENCE) == 5 * 8 * count


@pytest.mark.parametrize("case", [MAP, SEQUENCE], ids=lambda case: case.name)
def test_every_operator_runs_forward_and_backward(case: ScanCase) -> None:
    for row in measure(case).values():
        assert row.times.keys() == {FORWARD, FORWARD_BACKWARD, "copy"}
        assert row.peak_bytes == {FORWARD: 4096, FORWARD_BACKWARD: 4096}
        assert all(seconds > 0 for seconds in row.first_call_s.values())


def test_inputs_are_in_the_dtype_and_parameters_in_float32() -> None:
    dtypes = [t.dtype for t in MAP.inputs(1, dtype=torch.bfloat16)]
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] + [torch.bfloat16] * 2 + [torch.float32] * 2


def test_report_is_written_as_json() -> None:
    report = measure_cuda_ops(plan_rows([MAP], [1]), FakeDevice(), repeats=1)
    read = json.loads(json.dumps(report.as_dict()))
    assert read["copy_bytes_per_s"] == pytest.approx(1e6)
    assert read["rows"][0]["copy_share"][FORWARD] == pytest.approx(report.rows[0].copy_share(FORWARD))


def test_failure_of_a_row_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class SmallDevice(FakeDevice):
        def peak_bytes(self, _: Callable[[], object]) -> int:
            raise torch.OutOfMemoryError("CUDA out of memory")

    rows = plan_rows([MAP], [1])
    report = measure_cuda_ops(rows, SmallDevice(), repeats=1)
    assert [row.error for row in report.rows] == ["CUDA out of memory"] * 2
    monkeypatch.setattr(ops_cuda, "CudaDevice", SmallDevice)
    monkeypatch.setattr(ops_cuda, "plan_rows", lambda *_: rows)
    assert main(["bench", "ops", "--device", "cuda", "--repeats", "1"]) == 1
    assert "CUDA out of memory" in capsys.readouterr().out


def test_table_shows_times_and_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops_cuda, "CudaDevice", FakeDevice)
    arguments = ["--shapes", "vmamba-4", "--batch", "1", "--repeats", "1", "--dtype", "float32"]
    assert main(["bench", "ops", "--device", "cuda", *arguments]) == 0
    shown = capsys.readouterr().out
    [cells] = [line.split() for line in shown.splitlines() if line.startswith("cross_scan ")]
    assert cells[1:4] == ["vmamba-4", "1", "float32"]
    # Softplus and decay of 4 x 768 channels at 49 positions, in 2 ms at a million a second.
    assert (cells[5], cells[7]) == ("2.000", f"{100 * 4 * 768 * 49 * 3 / 1000 / 2:.0f}")


def test_copy_is_interleaved_with_the_passes() -> None:
    calls: list[str] = []

    class Logging(FakeDevice):
        def seconds(self, function: Callable[[], object]) -> float:
            calls.append("copy" if function == self.copy else "pass")
            return super().seconds(function)

    measure_cuda_ops(plan_rows([MAP], [1])[:1], Logging(), repeats=2)
    assert [sorted(calls[i : i + 3]) for i in (0, 3)] == [["copy", "pass", "pass"]] * 2


def test_device_time_is_that_between_two_events_after_the_host_got_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, _: object) -> float:
            return 3.0

    class Flushed:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    device = object.__new__(CudaDevice)
    device._flushed = Flushed()  # type: ignore[assignment]
    assert device.seconds(lambda: log.append("run")) == 0.003
    assert list(dict.fromkeys(log)) == ["flush", "record", "run", "synchronize"]
    assert log[-4:] == ["record", "run", "record", "synchronize"]


@no_device
def test_missing_device_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--device", "cuda"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "device 'cuda' is not available" in line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--dtype", "bfloat16"], "expected dtype float32 on cpu, got bfloat16"),
        (
            ["--device", "cuda", "--dtype", "int4"],
            "expected dtypes out of float32, bfloat16, float16, got int4",
        ),
        (["--device", "cuda", "--batch", "0"], "batches must be at least 1, got 0"),
    ],
)
def test_wrong_use_is_status_2(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert part in line


def test_parts_of_a_cpu_are_refused() -> None:
    with pytest.raises(UsageError, match="expected parts out of time, memory on cuda, got models"):
        measure_cuda_ops([], FakeDevice(), parts=["models"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_operators_are_measured_on_a_device() -> None:
    start = time.perf_counter()
    report = measure_cuda_ops(plan_rows([MAP, SEQUENCE], [2]), CudaDevice(), repeats=3)
    elapsed_ms = 1000 * (time.perf_counter() - start)
    assert [row.error for row in report.rows] == [None] * 5
    for row in report.rows:
        assert all(0 < timing.median_ms < elapsed_ms for timing in row.times.values())
        assert row.peak_bytes[FORWARD] >= row.output_bytes
        assert row.peak_bytes[FORWARD_BACKWARD] >= row.input_bytes
