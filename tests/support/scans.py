"""Scan inputs, official reference values and tolerances."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspine.ops.dispatch import BACKENDS, available_backends, triton_is_interpreted
from lightspine.ops.inputs import CrossScanInputs, SelectiveScanInputs
from lightspine.ops.selective_scan import selective_scan
from lightspine.ops.verify import TOLERANCE as TOLERANCE
from support.reference import assert_close

# With TRITON_INTERPRET=1 set, every test of a backend also runs the triton kernels, a hundred times slower.
CPU_BACKENDS = [
    name
    for name in BACKENDS
    if available_backends()[name][0] and (name != "triton" or triton_is_interpreted())
]
FAST_BACKENDS = [name for name in CPU_BACKENDS if name != "reference"]


def scan_inputs(
    batch: int = 2, dim: int = 8, length: int = 37, state_dim: int = 4, groups: int = 2, *, seed: int = 0
) -> SelectiveScanInputs:
    """Return float64 inputs with every optional tensor."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return SelectiveScanInputs(
        u=normal(batch, dim, length),
        delta=0.5 * normal(batch, dim, length),
        A=-torch.exp(0.5 * normal(dim, state_dim)),
        B=normal(batch, groups, state_dim, length),
        C=normal(batch, groups, state_dim, length),
        D=normal(dim),
        z=normal(batch, dim, length),
        delta_bias=normal(dim) - 1,
    )


def cross_inputs(
    batch: int = 2,
    height: int = 5,
    width: int = 7,
    dim: int = 6,
    state_dim: int = 2,
    groups: int = 4,
    *,
    seed: int = 0,
) -> CrossScanInputs:
    """Return float64 inputs with every optional tensor."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return CrossScanInputs(
        x=normal(batch, height, width, dim),
        delta=0.5 * normal(batch, height, width, groups, dim),
        A=-torch.exp(0.5 * normal(groups, dim, state_dim)),
        B=normal(batch, height, width, groups, state_dim),
        C=normal(batch, height, width, groups, state_dim),
        D=normal(groups, dim),
        delta_bias=normal(groups, dim) - 1,
    )


class ConvInputs(NamedTuple):
    """Tensors of a causal convolution: x (B, D, L), weight (K, D, W), bias (K, D)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def conv_inputs(
    batch: int = 2, dim: int = 3, length: int = 7, width: int = 4, groups: int = 2, *, seed: int = 0
) -> ConvInputs:
    """Return float64 inputs."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((batch, dim, length), (groups, dim, width), (groups, dim))
    return ConvInputs(*(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes))


def bidirectional_inputs(
    batch: int = 2, dim: int = 4, length: int = 7, state_dim: int = 3, *, seed: int = 0
) -> SelectiveScanInputs:
    """Return float64 inputs of both directions with a shared gate."""
    inputs = scan_inputs(batch, 2 * dim, length, state_dim, 2, seed=seed)
    assert inputs.z is not None
    return inputs._replace(z=inputs.z[:, :dim])


def convert(inputs: Any, dtype: torch.dtype) -> Any:
    """Cast inputs as a model does: A, D and delta_bias stay at least float32."""
    kept = torch.promote_types(dtype, torch.float32)
    return type(inputs)(
        *(
            None if t is None else t.to(kept if name in ("A", "D", "delta_bias") else dtype)
            for name, t in zip(inputs._fields, inputs, strict=True)
        )
    )


def results_and_gradients(operator: Any, inputs: Any, **options: Any) -> dict[str, Tensor]:
    """Return every output of an operator and the gradient of every input, by name.

    The gradients are those of a fixed random weighting of all outputs.
    """
    leaves = type(inputs)(*(None if t is None else t.detach().requires_grad_() for t in inputs))
    outputs = operator(leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t) for t in outputs]
    names = [name for name, t in zip(inputs._fields, inputs, strict=True) if t is not None]
    grads = torch.autograd.grad(outputs, [t for t in leaves if t is not None], weights)
    return {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {
        f"grad {name}": grad for name, grad in zip(names, grads, strict=True)
    }


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Compare every tensor with the reference, within the tolerance of its dtype."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        # What is float32 by contract inherits the rounding of the reduced-precision tensors that it is
        # computed with.
        tolerance = max(TOLERANCE[tensor.dtype], TOLERANCE[dtype])
        assert tensor.shape == expected[name].shape, name
        if expected[name].any():
            assert_close(name, tensor, expected[name], tolerance)
        else:
            assert not tensor.any(), f"{name} is not zero"


def run_scan(inputs: SelectiveScanInputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Call `selective_scan` on a tuple of inputs and return the output and the last state."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    out = selective_scan(u, delta, A, B, C, D, z, delta_bias, return_last_state=True, **options)
    assert isinstance(out, tuple)
    return out


def figure_inputs(case: dict[str, Any]) -> tuple[SelectiveScanInputs, Tensor]:
    """Return the inputs and output weights of a case of `ops.json`, generated as the file says."""
    draw = np.random.RandomState(case["seed"]).standard_normal
    batch, dim, state_dim, length, groups = (case[key] for key in ("batch", "d", "n", "L", "K"))
    u, delta = draw((batch, dim, length)), draw((batch, dim, length))
    A = -np.exp(np.log(np.arange(1, state_dim + 1)) + 0.1 * draw((dim, state_dim)))
    B, C = draw((batch, groups, state_dim, length)), draw((batch, groups, state_dim, length))
    D, delta_bias = 1 + 0.1 * draw((dim,)), -3 + 0.5 * draw((dim,))
    z, weights = draw((batch, dim, length)), draw((batch, dim, length))
    arrays = (
        u,
        0.5 * delta if case["with_delta_bias_and_softplus"] else 0.01 + 0.1 * np.abs(delta),
        A,
        B,
        C,
        D if case["with_D"] else None,
        z if case["with_z"] else None,
        delta_bias if case["with_delta_bias_and_softplus"] else None,
    )
    return SelectiveScanInputs(
        *(None if a is None else torch.from_numpy(a) for a in arrays)
    ), torch.from_numpy(weights)
