"""Comparison of compiled operators with the reference in float64, for `lightspine doctor --verify`.

`OPERATORS` lists the operators that have kernels. A new one is checked as soon as it is in this list.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightspine.ops.bidirectional_scan import bidirectional_scan
from lightspine.ops.causal_conv1d import causal_conv1d
from lightspine.ops.cross_scan import cross_scan, projected_cross_scan
from lightspine.ops.dispatch import available_backends, triton_is_interpreted
from lightspine.ops.inputs import CrossScanInputs, SelectiveScanInputs
from lightspine.ops.selective_scan import selective_scan
from lightspine.utils.devices import synchronize

__all__ = ["OPERATORS", "TOLERANCE", "Check", "OperatorUnderTest", "Verification", "plan_checks", "verify"]

# Largest relative L2 difference from the reference in float64. Reduced-precision results are rounded once, at
# the end.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float64: 1e-12}
# On a GPU the exponential of every decay is off by two units in the last place, and the tensor cores multiply
# float32 as two TF32 numbers.
_GPU_TOLERANCE = 1e-5
# Parameters that a model keeps in float32 at least.
_FULL_PRECISION = ("A", "D", "delta_bias")
_DIRECTIONS = 4


def tolerance(dtype: torch.dtype, device_type: str) -> float:
    """Return the largest relative L2 difference that is correct for inputs of a dtype on a device."""
    if device_type == "cuda" and dtype != torch.float64:
        return max(TOLERANCE[dtype], _GPU_TOLERANCE)
    return TOLERANCE[dtype]


class ProjectedScanInputs(NamedTuple):
    """Tensors of `projected_cross_scan`."""

    x: Tensor
    projected: Tensor
    dt_weight: Tensor
    A: Tensor
    D: Tensor
    delta_bias: Tensor


class ConvInputs(NamedTuple):
    """Tensors of `causal_conv1d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class OperatorUnderTest:
    """An operator that has kernels.

    Attributes:
        name: name in tables.
        backends: backends with kernels of this operator.
        outputs: names of its outputs.
        sizes: sizes in the order in which `make_inputs` takes them, with enough numbers in each tensor that
            roundings average out. Triton's interpreter runs the first two only, which must be small.
        make_inputs: returns a named tuple of float64 tensors for a random generator and sizes.
        run: runs the operator on such a tuple with a backend, "reference" included.
    """

    name: str
    backends: tuple[str, ...]
    outputs: tuple[str, ...] = ("output",)
    sizes: tuple[tuple[int, ...], ...]
    make_inputs: Callable[..., Any]
    run: Callable[[Any, str], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check to run: an operator by a backend in a dtype."""

    operator: OperatorUnderTest
    backend: str
    device: str
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of one check.

    Attributes:
        operator: name of the operator.
        backend: name of the backend.
        device: device type.
        dtype: dtype of the inputs.
        tolerance: largest correct difference.
        differences: largest relative L2 difference at any size of each output (with gradients recorded, and
            in inference mode) and of the gradient of each input; infinity for a NaN or a wrong shape.
        first_call_s: seconds of the first forward and backward, in which kernels are compiled or read from
            their cache on disk.
        error: message of an operator that failed, else `None`.
    """

    operator: str
    backend: str
    device: str
    dtype: str
    tolerance: float
    differences: dict[str, float]
    first_call_s: float
    error: str | None = None

    @property
    def wrong(self) -> list[str]:
        """Names of the tensors that are wrong."""
        # Not `difference > tolerance`, which is false for a NaN.
        return [name for name, value in self.differences.items() if not value <= self.tolerance]

    @property
    def correct(self) -> bool:
        """Whether the operator ran and every tensor is within the tolerance."""
        return self.error is None and not self.wrong

    @property
    def worst(self) -> str | None:
        """Name of the tensor with the largest difference; `None` if the operator failed at once."""
        return max(self.differences, key=self.differences.__getitem__, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with `None` for a difference that is not a number."""
        differences = {
            name: value if math.isfinite(value) else None for name, value in self.differences.items()
        }
        return asdict(self) | {"differences": differences, "correct": self.correct, "wrong": self.wrong}


def plan_checks() -> list[Check]:
    """Return the checks of all operators, in every dtype, by every backend that can run on this machine."""
    devices = {}
    backends = available_backends()
    if backends["cpu"][0]:
        devices["cpu"] = "cpu"
    if backends["triton"][0]:
        devices["triton"] = "cpu" if triton_is_interpreted() else "cuda"
    return [
        Check(operator=operator, backend=backend, device=device, dtype=dtype)
        for backend, device in devices.items()
        for operator in OPERATORS
        if backend in operator.backends
        for dtype in TOLERANCE
    ]


def verify(check: Check) -> Verification:
    """Run an operator at all its sizes and compare outputs and gradients with the reference in float64.

    The reference runs on the CPU, so that it does not depend on the device that is verified.
    """
    operator, device = check.operator, torch.device(check.device)
    interpreted = check.backend == "triton" and device.type == "cpu"
    differences: dict[str, float] = {}
    seconds: list[float] = []
    error: str | None = None
    for size in operator.sizes[: 2 if interpreted else None]:
        generator = torch.Generator().manual_seed(0)
        inputs = _convert(operator.make_inputs(generator, *size), check.dtype)
        exact = type(inputs)(*(t.double() for t in inputs))
        expected = _results(operator, exact, "reference")
        start = time.perf_counter()
        try:
            with _nan_in_fresh_memory():
                actual = _results(operator, type(inputs)(*(t.to(device) for t in inputs)), check.backend)
            synchronize(device)
        except Exception as failure:  # a kernel that does not compile or run is a result, too
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
            seconds.append(time.perf_counter() - start)
            break
        seconds.append(time.perf_counter() - start)
        for name, tensor in actual.items():
            difference = _relative_l2(tensor.cpu(), expected[name])
            differences[name] = max(difference, differences.get(name, 0.0))
    return Verification(
        operator=operator.name,
        backend=check.backend,
        device=check.device,
        dtype=str(check.dtype).removeprefix("torch."),
        tolerance=tolerance(check.dtype, device.type),
        differences=differences,
        first_call_s=seconds[0],
        error=error,
    )


def _results(operator: OperatorUnderTest, inputs: Any, backend: str) -> dict[str, Tensor]:
    """Return the outputs in inference mode and with gradients, and the gradient of every input, by name."""
    with torch.inference_mode():
        inferred = _as_tuple(operator.run(inputs, backend))
    leaves = type(inputs)(*(t.detach().requires_grad_() for t in inputs))
    outputs = _as_tuple(operator.run(leaves, backend))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return {
        **{f"{name} in inference": t for name, t in zip(operator.outputs, inferred, strict=True)},
        **{name: t.detach() for name, t in zip(operator.outputs, outputs, strict=True)},
        **{f"grad {name}": t for name, t in zip(inputs._fields, gradients, strict=True)},
    }


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _convert(inputs: Any, dtype: torch.dtype) -> Any:
    """Convert float64 inputs to what a model of this dtype passes to the operator."""
    kept = torch.promote_types(dtype, torch.float32)
    return type(inputs)(
        *(
            t.to(kept if name in _FULL_PRECISION else dtype)
            for name, t in zip(inputs._fields, inputs, strict=True)
        )
    )


def _relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|, or |actual| where zeros are expected."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return math.inf
    difference = (actual.double() - expected).norm()
    return float(difference / expected.norm() if expected.any() else difference)


@contextmanager
def _nan_in_fresh_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element which a kernel never writes is found."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # PyTorch fills new memory in its deterministic mode only, which warns about unrelated operators.
        warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _selective_inputs(
    generator: torch.Generator, batch: int, dim: int, length: int, states: int, groups: int
) -> SelectiveScanInputs:
    return SelectiveScanInputs(
        u=_normal(generator, batch, dim, length),
        delta=0.5 * _normal(generator, batch, dim, length),
        A=-torch.exp(0.5 * _normal(generator, dim, states)),
        B=_normal(generator, batch, groups, states, length),
        C=_normal(generator, batch, groups, states, length),
        D=_normal(generator, dim),
        z=_normal(generator, batch, dim, length),
        delta_bias=_normal(generator, dim) - 1,
    )


def _bidirectional_inputs(
    generator: torch.Generator, batch: int, dim: int, length: int, states: int
) -> SelectiveScanInputs:
    inputs = _selective_inputs(generator, batch, 2 * dim, length, states, 2)
    return inputs._replace(z=_normal(generator, batch, dim, length))


def _cross_inputs(
    generator: torch.Generator, batch: int, height: int, width: int, dim: int, states: int
) -> CrossScanInputs:
    pixels = (batch, height, width)
    return CrossScanInputs(
        x=_normal(generator, *pixels, dim),
        delta=0.5 * _normal(generator, *pixels, _DIRECTIONS, dim),
        A=-torch.exp(0.5 * _normal(generator, _DIRECTIONS, dim, states)),
        B=_normal(generator, *pixels, _DIRECTIONS, states),
        C=_normal(generator, *pixels, _DIRECTIONS, states),
        D=_normal(generator, _DIRECTIONS, dim),
        delta_bias=_normal(generator, _DIRECTIONS, dim) - 1,
    )


def _projected_inputs(
    generator: torch.Generator, batch: int, height: int, width: int, dim: int, states: int, rank: int
) -> ProjectedScanInputs:
    x, _, A, _, _, D, delta_bias = _cross_inputs(generator, batch, height, width, dim, states)
    assert D is not None
    assert delta_bias is not None
    weight = _normal(generator, _DIRECTIONS, dim, rank) / rank**0.5
    projected = _normal(generator, batch, height, width, _DIRECTIONS, rank + 2 * states)
    return ProjectedScanInputs(x, projected, weight.transpose(1, 2), A, D, delta_bias)


def _conv_inputs(
    generator: torch.Generator, batch: int, dim: int, length: int, width: int, groups: int
) -> ConvInputs:
    return ConvInputs(
        _normal(generator, batch, dim, length),
        _normal(generator, groups, dim, width),
        _normal(generator, groups, dim),
    )


def _run_selective_scan(inputs: SelectiveScanInputs, backend: str) -> Tensor | tuple[Tensor, ...]:
    return selective_scan(*inputs, delta_softplus=True, return_last_state=True, backend=backend)


def _run_bidirectional_scan(inputs: SelectiveScanInputs, backend: str) -> Tensor:
    return bidirectional_scan(*inputs, delta_softplus=True, backend=backend)


def _run_cross_scan(inputs: CrossScanInputs, backend: str) -> Tensor:
    return cross_scan(*inputs, backend=backend)


def _run_projected_cross_scan(inputs: ProjectedScanInputs, backend: str) -> Tensor:
    x, projected, dt_weight, A, D, delta_bias = inputs
    if backend != "reference":
        return projected_cross_scan(x, projected, dt_weight, A, D, delta_bias, backend=backend)
    rank, states = dt_weight.shape[1], A.shape[2]
    dt, B, C = projected.split([rank, states, states], dim=-1)
    delta = torch.einsum("bhwkr,krd->bhwkd", dt, dt_weight)
    return cross_scan(x, delta, A, B, C, D, delta_bias, backend=backend)


def _run_causal_conv1d(inputs: ConvInputs, backend: str) -> Tensor:
    # The last group runs backward.
    reverse = tuple(group % 2 == 1 for group in range(inputs.weight.shape[0]))
    return causal_conv1d(*inputs, silu=True, reverse=reverse, backend=backend)


OPERATORS: tuple[OperatorUnderTest, ...] = (
    OperatorUnderTest(
        name="selective_scan",
        backends=("cpu", "triton"),
        outputs=("output", "last state"),
        # images, channels, length, states, groups of B and C
        sizes=((2, 34, 7, 3, 2), (2, 40, 1, 1, 1), (3, 1, 33, 1, 1), (1, 100, 197, 16, 1)),
        make_inputs=_selective_inputs,
        run=_run_selective_scan,
    ),
    OperatorUnderTest(
        name="bidirectional_scan",
        backends=("cpu", "triton"),
        # images, channels of a direction, length, states
        sizes=((2, 17, 7, 3), (2, 40, 1, 1), (3, 9, 33, 1), (1, 96, 197, 16)),
        make_inputs=_bidirectional_inputs,
        run=_run_bidirectional_scan,
    ),
    OperatorUnderTest(
        name="cross_scan",
        backends=("cpu", "triton"),
        # images, height, width, channels, states
        sizes=((2, 2, 3, 17, 1), (2, 1, 1, 40, 3), (1, 13, 11, 100, 1), (3, 7, 7, 40, 3)),
        make_inputs=_cross_inputs,
        run=_run_cross_scan,
    ),
    OperatorUnderTest(
        name="projected_cross_scan",
        backends=("cpu", "triton"),
        # images, height, width, channels, states, rank of the projection
        sizes=((2, 2, 3, 17, 1, 2), (2, 1, 1, 40, 1, 1), (1, 13, 11, 100, 1, 6), (3, 7, 7, 40, 3, 3)),
        make_inputs=_projected_inputs,
        run=_run_projected_cross_scan,
    ),
    OperatorUnderTest(
        name="causal_conv1d",
        backends=("triton",),
        # images, channels, length, filter width, groups of filters
        sizes=((2, 17, 7, 4, 2), (2, 40, 1, 4, 1), (3, 65, 33, 3, 2), (1, 100, 197, 4, 2)),
        make_inputs=_conv_inputs,
        run=_run_causal_conv1d,
    ),
)
