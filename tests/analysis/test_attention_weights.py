"""Implicit attention matrices of the scans: rows and columns match the operators' outputs."""

import pytest
import torch
from torch import Tensor

import lightspine
from lightspine.analysis.attention_weights import DirectedScan, directed_scans, scan_column, scan_row
from lightspine.analysis.op_recorder import OpCall, record_calls
from lightspine.errors import UsageError
from lightspine.ops import cross_scan, selective_scan


def calls_of(name: str, **sizes: object) -> list[OpCall]:
    """Return the recorded scans of a small model with randomized parameters."""
    model = lightspine.create_model(name, num_classes=2, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return record_calls(model, torch.randn(1, 3, 40, 56))


@pytest.fixture(scope="module")
def vmamba() -> OpCall:
    return calls_of("vmamba_tiny", depths=[1], embed_dims=[12], state_dim=2)[0]


@pytest.fixture(scope="module")
def vim() -> list[OpCall]:
    return calls_of("vim_tiny", depth=1, dim=16, stride=8)


def input_by_place(scan: DirectedScan) -> Tensor:
    return torch.zeros_like(scan.x).index_copy(0, scan.positions, scan.x)


def test_rows_of_the_four_directions_reproduce_the_scan_of_vmamba(vmamba: OpCall) -> None:
    scans = directed_scans(vmamba)
    expected = vmamba.output[0].flatten(0, 1).double()
    got = torch.stack(
        [
            sum((scan_row(scan, place) * input_by_place(scan)).sum(0) for scan in scans)
            for place in range(len(expected))
        ]
    )
    assert len(scans) == 4
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_each_direction_reproduce_the_scan_of_vim(vim: list[OpCall]) -> None:
    assert [call.args[9] for call in vim] == [False, True]
    for call in vim:
        (scan,) = directed_scans(call)
        expected = call.output[0].t().double()
        rows = [(scan_row(scan, place) * input_by_place(scan)).sum(0) for place in range(len(expected))]
        torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", [True, False])
def test_columns_are_the_columns_of_the_rows(vmamba: OpCall, skip: bool) -> None:
    for scan in directed_scans(vmamba):
        matrix = torch.stack([scan_row(scan, i, skip=skip) for i in range(len(scan.positions))])
        for place in (0, 17, len(matrix) - 1):
            torch.testing.assert_close(scan_column(scan, place, skip=skip), matrix[:, place])


def test_column_is_what_a_change_of_one_pixel_does_to_the_output(vmamba: OpCall) -> None:
    x, *others = vmamba.args[:9]
    place, change = 31, 0.5
    moved = x.clone().double()
    moved.view(-1, x.shape[3])[place] += change
    wide = [other.double() if isinstance(other, Tensor) else other for other in others]
    difference = cross_scan(moved, *wide, backend="reference") - cross_scan(
        x.double(), *wide, backend="reference"
    )
    column = sum(scan_column(scan, place) for scan in directed_scans(vmamba))
    torch.testing.assert_close(change * column, difference[0].flatten(0, 1), rtol=1e-9, atol=1e-9)


def test_direction_reads_only_what_it_has_passed(vmamba: OpCall) -> None:
    rows, columns, rows_back, _ = directed_scans(vmamba)
    height, width = vmamba.args[0].shape[1:3]
    place = 4 * width + 3
    seen = [scan_row(scan, place).abs().sum(1).view(height, width) > 0 for scan in (rows, columns, rows_back)]
    assert not seen[0].flatten()[place + 1 :].any()
    assert not seen[1][:, 4:].any()
    assert not seen[1][5:, 3].any()
    assert not seen[2].flatten()[:place].any()


def test_groups_of_channels_read_their_own_projections() -> None:
    u, delta = torch.randn(2, 1, 6, 9, dtype=torch.float64)
    B, C = torch.randn(2, 1, 3, 2, 9, dtype=torch.float64)
    A = -torch.rand(6, 2, dtype=torch.float64)
    out = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="reference")
    args = (u, delta, A, B, C, None, None, None, True, False)
    (scan,) = directed_scans(OpCall("", "selective_scan", args, {}, out))
    got = torch.stack([(scan_row(scan, i) * scan.x).sum(0) for i in range(9)])
    torch.testing.assert_close(got, out[0].t())


def test_several_images_at_once_are_refused(vmamba: OpCall) -> None:
    x = vmamba.args[0].expand(2, -1, -1, -1)
    call = OpCall("ssm", "cross_scan", (x, *vmamba.args[1:]), {}, vmamba.output)
    with pytest.raises(UsageError, match="expected a scan of one image, got 2 images"):
        directed_scans(call)
