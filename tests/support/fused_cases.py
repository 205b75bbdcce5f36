"""Run the kernels of `projected_cross_scan` in Triton's interpreter and print their differences, as JSON.

A program of its own, because Triton decides at the first import whether kernels are compiled or interpreted:
`TRITON_INTERPRET=1 python -m support.fused_cases fast` in `tests/` prints
{case: {tensor: [difference, tolerance]}}.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lightspine.models.vmamba as vmamba
from lightspine.blocks import SS2D
from lightspine.models.vmamba import VMamba
from lightspine.ops import cross_scan, register_scan_order
from lightspine.ops.cross_scan import fused_cross_scan_op, projected_cross_scan
from lightspine.ops.triton import cross_scan_launch
from support.scans import TOLERANCE, results_and_gradients
from support.triton_cases import Report, difference, snake

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Inputs(NamedTuple):
    """The tensors of `projected_cross_scan`."""

    x: Tensor
    projected: Tensor
    dt_weight: Tensor
    A: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


def make_inputs(
    batch: int = 1,
    height: int = 3,
    width: int = 5,
    dim: int = 3,
    rank: int = 2,
    groups: int = 4,
    dtype: torch.dtype = F64,
) -> Inputs:
    """Return inputs as a model hands them over: parameters never below float32, the weight transposed."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=F64)

    state = torch.promote_types(dtype, F32)
    return Inputs(
        normal(batch, height, width, dim).to(dtype),
        normal(batch, height, width, groups, rank + 2).to(dtype),
        (normal(groups, dim, rank) / rank**0.5).to(dtype).transpose(1, 2),
        -torch.exp(0.5 * normal(groups, dim, 1)).to(state),
        normal(groups, dim).to(state),
        (normal(groups, dim) - 1).to(state),
    )


def run_fused(inputs: Inputs, **options: Any) -> Tensor:
    return projected_cross_scan(*inputs, backend="triton", **options)


def run_definition(inputs: Inputs, order: str = "cross2d", **_: Any) -> Tensor:
    x, projected, weight, A, D, bias = inputs
    dt, B, C = projected.split([weight.shape[1], 1, 1], dim=-1)
    delta = torch.einsum("bhwkr,krd->bhwkd", dt, weight)
    return cross_scan(x, delta, A, B, C, D, bias, order=order, backend="reference")


@contextmanager
def launch_limits(**limits: Any) -> Iterator[None]:
    """Change limits of the launch, to split small inputs as large ones are split on a device."""
    before = {name: getattr(cross_scan_launch, name) for name in limits}
    for name, value in limits.items():
        setattr(cross_scan_launch, name, value)
    yield
    for name, value in before.items():
        setattr(cross_scan_launch, name, value)


def short_chunks(**limits: Any) -> AbstractContextManager[None]:
    """Cut maps into chunks of one tile."""
    return launch_limits(choose_chunks=lambda length, *_: (16, -(-length // 16)), **limits)


def compare(inputs: Inputs, **options: Any) -> Report:
    """Return the difference from the definition in float64 and the tolerance of every output and gradient."""
    exact = Inputs(*(None if t is None else t.double() for t in inputs))
    actual = results_and_gradients(run_fused, inputs, **options)
    expected = results_and_gradients(run_definition, exact, **options)
    assert actual.keys() == expected.keys()
    least = TOLERANCE[inputs.x.dtype]
    return {
        name: (difference(t, expected[name]), max(TOLERANCE[t.dtype], least)) for name, t in actual.items()
    }


def compare_cut(inputs: Inputs, limits: dict[str, int] | None = None, **options: Any) -> Report:
    with short_chunks(**limits or {}):
        return compare(inputs, **options)


def compare_slices(inputs: Inputs, images_per_slice: int, order: str = "cross2d", **limits: Any) -> Report:
    """Let the backward process few images at a time."""
    image = inputs.projected[0].numel() * -(-inputs.x.shape[3] // 32) * 8
    with launch_limits(_SLICE_BYTES=images_per_slice * image, **limits):
        return compare(inputs, order=order)


def compare_strided() -> Report:
    """Take channels of a wider map, pixels of a larger one, and every second image."""
    inputs = make_inputs(2, 3, 5, 4)
    wide = torch.zeros(4, 3, 5, 10, dtype=F64)
    wide[::2, :, :, 3:7] = inputs.x
    rows = torch.zeros(2, 3, 5, 4, 6, dtype=F64)
    rows[..., 1:5] = inputs.projected
    return compare(inputs._replace(x=wide[::2, :, :, 3:7], projected=rows[..., 1:5]))


def compare_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> Report:
    return {name: (float((first[name] != second[name]).sum()), 0.0) for name in first}


def repeat() -> Report:
    inputs = make_inputs(1, 3, 6, 2, dtype=F32)
    with short_chunks(_PARTIAL_NUMBERS=1):
        return compare_bits(*(results_and_gradients(run_fused, inputs) for _ in range(2)))


def cut_one_image() -> Report:
    inputs = make_inputs(3, 2, 3, 6, dtype=F32)
    one = inputs._replace(x=inputs.x[1:2], projected=inputs.projected[1:2])
    return compare_bits({"output": run_fused(inputs)[1:2]}, {"output": run_fused(one)})


def check_operator() -> Report:
    inputs = [t.detach().clone().requires_grad_() for t in make_inputs(1, 1, 3, dtype=F32) if t is not None]
    with warnings.catch_warnings():
        # The check itself reads the gradients of tensors that are no leaves.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor")
        torch.library.opcheck(fused_cross_scan_op, (*inputs, "cross2d", True))
        torch.library.opcheck(fused_cross_scan_op, (*inputs[:4], None, None, "cross2d", False))
    return {"opcheck": (0.0, 0.0)}


def compare_compiled() -> Report:
    inputs = make_inputs(dtype=F32)
    compiled = torch.compile(run_fused, fullgraph=True, backend="aot_eager")
    return compare_bits(results_and_gradients(compiled, inputs), results_and_gradients(run_fused, inputs))


@contextmanager
def fused_models() -> Iterator[None]:
    """Let SS2D on a CPU take the path that it takes on a device."""
    before = vmamba.fuses_projection, vmamba.projected_cross_scan
    vmamba.fuses_projection = lambda _, state_dim: state_dim == 1
    vmamba.projected_cross_scan = partial(projected_cross_scan, backend="triton")
    yield
    vmamba.fuses_projection, vmamba.projected_cross_scan = before


def compare_module(module: torch.nn.Module, x: Tensor, autocast: bool = False) -> Report:
    """Compare a module on the kernels with itself on the CPU's, output and all gradients."""

    def run() -> dict[str, Tensor]:
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        y.float().square().sum().backward()
        grads = {
            f"grad {name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
        }
        return {"output": y.detach()} | grads

    expected = run()
    with fused_models():
        actual = run()
    assert actual.keys() == expected.keys()
    tolerance = 3e-2 if autocast else 2e-5
    return {name: (difference(t, expected[name]), tolerance) for name, t in actual.items()}


def ss2d(autocast: bool = False, **options: Any) -> Report:
    torch.manual_seed(0)
    return compare_module(SS2D(4, **options), torch.randn(1, 4, 2, 3), autocast)


def vmamba_model() -> Report:
    torch.manual_seed(0)
    model = VMamba(num_classes=3, depths=(1, 1), embed_dims=(8, 16))
    return compare_module(model, torch.randn(1, 3, 16, 16))


# The interpreter takes some 0.1 s for a tile of the backward: even these are tiny.
FAST_CASES: dict[str, Callable[[], Report]] = {
    "one pixel, one channel": lambda: compare(make_inputs(1, 1, 1, 1, 1)),
    "L2": lambda: compare(make_inputs(1, 1, 2, 3)),
    "empty batch": lambda: compare(make_inputs(0)),
    "L15, 40 channels": lambda: compare(make_inputs(1, 3, 5, 40, 6)),
    "L31, two images": lambda: compare(make_inputs(2, 1, 31, 1)),
    "L33, chunks": lambda: compare_cut(make_inputs(1, 3, 11, 1)),
    "L33, chunks, two images a program": lambda: compare_cut(
        make_inputs(3, 1, 17, 1), {"_PARTIAL_NUMBERS": 40}
    ),
    "three images in slices of two": lambda: compare_slices(make_inputs(3, 1, 3, 1), 2),
    "slices and two channel blocks": lambda: compare_slices(make_inputs(3, 1, 2, 33, groups=1), 2, "snake"),
    "rank 17": lambda: compare(make_inputs(1, 3, 3, 2, 17)),
    "rank 33, one direction": lambda: compare(make_inputs(2, 1, 2, 2, 33, groups=1), order="snake"),
    "a user's own order": lambda: compare_cut(make_inputs(1, 3, 6, 2, groups=1), order="snake"),
    "without D and bias": lambda: compare(make_inputs()._replace(D=None, delta_bias=None)),
    "without saved states": lambda: compare_cut(make_inputs(1, 3, 6, 2), save_states=False),
    "strided": compare_strided,
    "float32": lambda: compare(make_inputs(1, 3, 6, 6, 6, dtype=F32)),
    "bfloat16": lambda: compare(make_inputs(1, 3, 6, 6, 6, dtype=BF16)),
    "float16": lambda: compare(make_inputs(1, 3, 6, 6, 6, dtype=F16)),
    "repeated": repeat,
    "one image of a batch": cut_one_image,
    "opcheck": check_operator,
    "torch.compile": compare_compiled,
    "SS2D": ss2d,
    "SS2D, autocast": lambda: ss2d(autocast=True),
}
SLOW_CASES: dict[str, Callable[[], Report]] = {
    "L15, odd channels": lambda: compare(make_inputs(2, 3, 5, 5)),
    "rank 16": lambda: compare(make_inputs(1, 3, 3, 2, 16)),
    "unidirectional": lambda: compare_cut(make_inputs(1, 3, 6, 2), order="unidirectional"),
    "bidirectional": lambda: compare_cut(make_inputs(1, 3, 6, 2), order="bidirectional"),
    "SS2D, recompute": lambda: ss2d(recompute=True),
    "slices, two images a program": lambda: compare_slices(make_inputs(5, 1, 2, 1), 3, _PARTIAL_NUMBERS=4),
    "L197": lambda: compare_cut(make_inputs(1, 1, 197, 2)),
    "96 channels": lambda: compare(make_inputs(1, 3, 6, 96, 6)),
    "100 channels, rank 48": lambda: compare(make_inputs(1, 3, 6, 100, 48, dtype=F32)),
    "VMamba": vmamba_model,
}


def main() -> None:
    """Run one table of cases, "fast" or "slow", and print the report."""
    # What an operator never writes is NaN, as in the tests of the other backends.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    register_scan_order("snake", snake)
    cases = {"fast": FAST_CASES, "slow": SLOW_CASES}[sys.argv[1]]
    chosen = sys.argv[2:] or list(cases)
    sys.stdout.write(json.dumps({name: cases[name]() for name in chosen}))


if __name__ == "__main__":
    main()
