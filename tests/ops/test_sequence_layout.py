"""CPU kernels on contiguous sequences (B, D, L), which they transpose in blocks."""

import pytest
import torch
from torch import Tensor

from lightspine.ops.inputs import SelectiveScanInputs
from lightspine.ops.reference import selective_scan_reference
from lightspine.ops.selective_scan import scan
from support.reference import assert_close
from support.scans import TOLERANCE, convert, scan_inputs

SEQUENCES = ("u", "delta", "z")


def as_tokens(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def results(
    inputs: SelectiveScanInputs, grad_out: Tensor, reverse: bool, save_states: bool = True
) -> dict[str, Tensor]:
    leaves = SelectiveScanInputs(*(t.detach().requires_grad_() for t in inputs if t is not None))
    out = scan(*leaves, True, reverse, save_states=save_states)
    grads = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach(), **dict(zip(leaves._fields, grads, strict=True))}


def expected_results(inputs: SelectiveScanInputs, grad_out: Tensor, reverse: bool) -> dict[str, Tensor]:
    leaves = SelectiveScanInputs(*(t.double().requires_grad_() for t in inputs if t is not None))
    out, _ = selective_scan_reference(*leaves, True, reverse)
    grads = torch.autograd.grad(out, leaves, grad_out.double())
    return {"out": out, **dict(zip(leaves._fields, grads, strict=True))}


@pytest.mark.parametrize("save_states", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    # Channels and positions that fill registers and parts, that do not, and several chunks of saved states.
    ("dim", "length", "state_dim"),
    [(32, 128, 1), (20, 37, 4), (2, 131, 3), (34, 900, 16), (6, 2, 2)],
)
def test_contiguous_sequences(
    dim: int, length: int, state_dim: int, reverse: bool, save_states: bool
) -> None:
    inputs = convert(scan_inputs(2, dim, length, state_dim), torch.float32)
    grad_out = torch.randn(2, dim, length)
    actual = results(inputs, grad_out, reverse, save_states)
    for name, wanted in expected_results(inputs, grad_out, reverse).items():
        assert_close(name, actual[name], wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    inputs, grad_out = convert(scan_inputs(2, 20, 37), dtype), torch.randn(2, 20, 37).to(dtype)
    actual = results(inputs, grad_out, True)
    for name, wanted in expected_results(inputs, grad_out, True).items():
        assert_close(name, actual[name], wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [("u",), ("delta", "grad"), ("z",), ("u", "delta", "z"), ("grad",)])
def test_layouts_are_mixed_and_kept(tokens: tuple[str, ...]) -> None:
    inputs = convert(scan_inputs(2, 20, 37), torch.float32)
    grad_out = torch.randn(2, 20, 37)
    wanted = results(inputs, grad_out, False)
    mixed = inputs._replace(**{name: as_tokens(getattr(inputs, name)) for name in tokens if name != "grad"})
    actual = results(mixed, as_tokens(grad_out) if "grad" in tokens else grad_out, False)
    for name, value in actual.items():
        assert_close(name, value, wanted[name], 1e-6)
    assert actual["out"].stride() == mixed.u.stride()
    for name in SEQUENCES:
        assert actual[name].stride() == getattr(mixed, name).stride(), name


def test_halves_of_a_sequence_are_read_in_place() -> None:
    inputs = convert(scan_inputs(2, 20, 37), torch.float32)
    assert inputs.z is not None
    u, z = torch.cat((inputs.u, inputs.z), dim=1).chunk(2, dim=1)
    grad_out = torch.randn(2, 20, 37)
    wanted = results(inputs, grad_out, False)
    for name, value in results(inputs._replace(u=u, z=z), grad_out, False).items():
        assert torch.equal(value, wanted[name]), name


# opcheck itself accesses the gradients of non-leaf tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("tokens", ["none", "u", "delta"])
def test_operator_with_sequences_passes_opcheck(tokens: str) -> None:
    inputs = convert(scan_inputs(2, 20, 37), torch.float32)
    inputs = inputs._replace(
        **{name: as_tokens(t) for name, t in inputs._asdict().items() if name == tokens and t is not None}
    )
    leaves = tuple(t.requires_grad_() for t in inputs if t is not None)
    torch.library.opcheck(torch.ops.lightspine.selective_scan.default, (*leaves, True, False, True, "auto"))


def test_no_sequence_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = convert(scan_inputs(2, 20, 37), torch.float32)
    copied = []
    contiguous = Tensor.contiguous

    def count(self: Tensor, *args: object, **options: object) -> Tensor:
        if self.dim() == 3 and 37 in self.shape:
            copied.append(self.shape)
        return contiguous(self, *args, **options)

    monkeypatch.setattr(Tensor, "contiguous", count)
    with torch.no_grad():
        scan(*inputs, True)
    assert copied == []
