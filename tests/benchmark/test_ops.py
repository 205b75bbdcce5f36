"""Benchmark of the scan operators; no durations are asserted."""

import json

import pytest
import torch
import torch.nn as nn

from lightspine.benchmark.ops import (
    ELEMENTWISE,
    FORWARD,
    FORWARD_BACKWARD,
    REFERENCE_FORWARD,
    TORCH_FORWARD,
    TORCH_FORWARD_BACKWARD,
    count_steps,
    measure_ops,
    measure_scan_memory,
    measure_scan_share,
)
from lightspine.benchmark.ops_cases import CASES, ScanCase, find_cases
from lightspine.benchmark.peak_rss import RESOLUTION_BYTES, can_measure_memory
from lightspine.blocks import VimBlock, VSSBlock
from lightspine.errors import UsageError

MAP = ScanCase(name="map", dim=8, height=5, width=3, state_dim=1, directions=4)
SEQUENCE = ScanCase(name="sequence", dim=8, height=1, width=15, state_dim=4, directions=0)
MIB = 2**20
needs_high_water_mark = pytest.mark.skipif(
    not can_measure_memory(), reason="the system lets no process set its high-water mark back"
)


@pytest.mark.parametrize("case", [MAP, SEQUENCE], ids=lambda case: case.name)
def test_backends_agree_on_the_inputs_of_a_case(case: ScanCase) -> None:
    inputs = case.inputs(2)
    expected = case.operator("reference")(*inputs)
    for backend in ("auto", "torch"):
        torch.testing.assert_close(case.operator(backend)(*inputs), expected)


def test_published_cases_have_the_published_sizes() -> None:
    sizes = {case.name: (case.channels, case.length, case.state_dim) for case in CASES}
    assert sizes == {
        "vmamba-1": (4 * 96, 3136, 1),
        "vmamba-2": (4 * 192, 784, 1),
        "vmamba-3": (4 * 384, 196, 1),
        "vmamba-4": (4 * 768, 49, 1),
        "vim-197": (384, 197, 16),
        "vim-1025": (384, 1025, 16),
        "vim-6085": (384, 6085, 16),
    }


@pytest.mark.parametrize("names", [["vmamba-4", "vmamba-9"], []], ids=["unknown", "none"])
def test_unknown_shape_is_named_with_the_known_ones(names: list[str]) -> None:
    with pytest.raises(UsageError, match=r"expected shapes from vmamba-1, .*got (vmamba-9|none)"):
        find_cases(names)


def test_report_has_a_row_per_shape_and_batch() -> None:
    steps: list[str] = []
    cases, batches, parts = [MAP, SEQUENCE], [1, 2], ["time"]
    report = measure_ops(cases, batches, repeats=2, parts=parts, on_step=steps.append)
    assert [(row.case.name, row.batch) for row in report.rows] == [
        ("map", 1),
        ("sequence", 1),
        ("map", 2),
        ("sequence", 2),
    ]
    assert len(steps) == count_steps(cases, batches, parts) == 4
    assert all(
        {FORWARD, ELEMENTWISE, TORCH_FORWARD, FORWARD_BACKWARD} <= row.times.keys() for row in report.rows
    )
    assert json.loads(json.dumps(report.as_dict()))["rows"][0]["case"]["name"] == "map"


def test_slow_comparisons_are_timed_in_a_batch_of_one_only() -> None:
    report = measure_ops([MAP], [1, 2], repeats=1, parts=["time"])
    one, two = (row.times.keys() for row in report.rows)
    assert one - two == {REFERENCE_FORWARD, TORCH_FORWARD_BACKWARD}


def test_thread_count_is_that_asked_for_and_restored() -> None:
    before = torch.get_num_threads()
    report = measure_ops([MAP], [1], threads=before + 1, repeats=1, parts=["time"])
    assert (report.threads, torch.get_num_threads()) == (before + 1, before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"parts": ["speed"]}, "expected parts from time, memory, models, got speed"),
        ({"repeats": 0}, "must be at least 1, got 0"),
        ({"threads": -2}, "must be at least 1, got -2"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        measure_ops([MAP], [1], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [VimBlock(16), VSSBlock(16)], ids=["vim", "vmamba"])
def test_share_counts_the_scans_of_both_kinds(block: nn.Module) -> None:
    share = measure_scan_share(block, torch.randn(1, 16, 8, 8), repeats=2, warmup=1)
    assert 0 < share.scan_ms < share.forward_ms
    assert 0 < share.share < 1


def test_share_of_a_model_without_scans_is_zero() -> None:
    assert measure_scan_share(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 8, 8), repeats=1).share == 0


@needs_high_water_mark
def test_peak_of_a_pass_holds_at_least_its_results() -> None:
    # Outputs of 8 MiB and inputs of some 50 MiB, far above the resolution of the method.
    case = ScanCase(name="wide", dim=512, height=64, width=64, state_dim=1, directions=4)
    [(found, batch, memory)] = measure_scan_memory([(case, 1)], threads=1)
    assert (found, batch, memory.outputs) == (case, 1, 8 * MIB)
    assert memory.forward > memory.outputs - RESOLUTION_BYTES
    assert memory.backward > memory.inputs - RESOLUTION_BYTES


def test_models_part_has_shares_and_saved_activations() -> None:
    report = measure_ops([], [1], repeats=1, parts=["models"])
    assert set(report.shares) == {"vmamba_tiny", "vim_tiny"}
    assert all(0 < entry.recomputed < entry.saved for entry in report.saved)
