"""Benchmark of the operators on a CUDA device: time, peak memory and the shares of two lower bounds.

The copy floor is the time to read all inputs and write all outputs once, at the rate at which the device
copies memory. The special-function floor is the time of all exponentials, logarithms and reciprocals at the
rate of the device's special-function units.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightspine.benchmark.interleaved_timing import Timing, time_interleaved
from lightspine.benchmark.memory import describe_failure
from lightspine.benchmark.ops_cases import ScanCase, random_normal
from lightspine.benchmark.system import describe_system
from lightspine.errors import UsageError
from lightspine.ops import bidirectional_scan, causal_conv1d
from lightspine.ops.cross_scan import cross_scan, projected_cross_scan
from lightspine.ops.selective_scan import scan
from lightspine.utils.devices import check_device

FORWARD, FORWARD_BACKWARD, COPY = "forward", "forward+backward", "copy"
PASSES = (FORWARD, FORWARD_BACKWARD)
PARTS = ("time", "memory")
DTYPES = ("float32", "bfloat16", "float16")

# Results of a multiprocessor's special-function units per clock cycle, compute capability 7.0 and higher.
_SPECIAL_FUNCTIONS_PER_CYCLE = 16
# Larger than the level-2 cache of any device.
_COPY_BYTES, _FLUSH_BYTES = 2**29, 2**28
# Some milliseconds of work before a timed call, during which the host launches the kernels of the call.
_FLUSHES = 16
_CONV_WIDTH = 4
# Batch sizes of the published throughput at 224 pixels, and smaller ones for larger images.
_VMAMBA_BATCHES = (128, 1)
_VIM_BATCHES = {197: (128,), 1025: (16,), 6085: (8, 1)}


class Device(Protocol):
    """What the benchmark needs of a device."""

    name: str
    torch_device: torch.device
    special_functions_per_s: float

    def seconds(self, function: Callable[[], object]) -> float:
        """Run a function and return the seconds that the device took."""

    def synchronize(self) -> None:
        """Wait until all work on the device is done."""

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """Run a function and return the most memory that it added."""

    def copy(self) -> object:
        """Copy `copy_bytes` bytes."""

    @property
    def copy_bytes(self) -> int:
        """Bytes that `copy` reads; it writes as many."""


class CudaDevice:
    """The current CUDA device.

    Raises:
        UsageError: this machine has no CUDA device.
    """

    def __init__(self) -> None:
        check_device("cuda")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name: str = properties.name
        self.special_functions_per_s = (
            _SPECIAL_FUNCTIONS_PER_CYCLE * properties.multi_processor_count * 1000.0 * properties.clock_rate
        )
        size = min(_COPY_BYTES, properties.total_memory // 32)
        self._source, self._target = (self._allocate(size) for _ in range(2))
        self._flushed = self._allocate(_FLUSH_BYTES)

    def _allocate(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.torch_device)

    def seconds(self, function: Callable[[], object]) -> float:
        """Run a function with a cold cache and return the seconds between two events around it.

        The device is kept busy until the host has launched the kernels of the function, so that the time of
        launching them is not included.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            self._flushed.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def synchronize(self) -> None:
        """Wait until all work on the device is done."""
        torch.cuda.synchronize(self.torch_device)

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """Run a function and return the peak of PyTorch's allocator above what was allocated before."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def copy(self) -> object:
        """Copy `copy_bytes` bytes within the device's memory."""
        return self._target.copy_(self._source)

    @property
    def copy_bytes(self) -> int:
        """Bytes that `copy` reads; it writes as many."""
        return self._source.nbytes


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator of the benchmark.

    Attributes:
        name: name in tables.
        make_inputs: returns its tensors for a shape, a batch size, a dtype and a device.
        run: computes the output from these tensors.
        special_functions: exponentials, logarithms and reciprocals of the forward pass per image.
    """

    name: str
    make_inputs: Callable[[ScanCase, int, torch.dtype, torch.device], list[Tensor]]
    run: Callable[..., Tensor]
    special_functions: Callable[[ScanCase], int]


@dataclass(kw_only=True)
class CudaRow:
    """Measurements of one operator at one shape, batch size and dtype.

    Attributes:
        operator: name of the operator.
        case: the shape.
        batch: batch size.
        dtype: dtype of the inputs; parameters are float32.
        input_bytes: size of all inputs.
        output_bytes: size of the output.
        first_call_s: seconds of the first call by pass; includes compiling the kernels that no earlier row
            used and that are not in Triton's cache on disk.
        times: time on the device of each of `PASSES`, and of copying memory (`COPY`).
        copy_bytes_per_s: bytes read and written per second by the copy, which is interleaved with the passes.
        copy_floor_ms: time of reading inputs and writing outputs once at that rate, by pass.
        special_function_floor_ms: time of the special functions, by pass.
        peak_bytes: peak memory above the inputs, by pass; includes the output and the gradients.
        error: why the row could not be measured, else `None`.
    """

    operator: str
    case: ScanCase
    batch: int
    dtype: str
    input_bytes: int = 0
    output_bytes: int = 0
    first_call_s: dict[str, float] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)
    copy_bytes_per_s: float | None = None
    copy_floor_ms: dict[str, float] = field(default_factory=dict)
    special_function_floor_ms: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    def copy_share(self, name: str) -> float:
        """Return the copy floor divided by the measured time of a pass, 0 to 1."""
        return self.copy_floor_ms[name] / self.times[name].median_ms

    def special_function_share(self, name: str) -> float:
        """Return the special-function floor divided by the measured time of a pass, 0 to 1."""
        return self.special_function_floor_ms[name] / self.times[name].median_ms

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the shares."""
        passes = [name for name in PASSES if name in self.times]
        return asdict(self) | {
            "copy_share": {name: self.copy_share(name) for name in passes},
            "special_function_share": {name: self.special_function_share(name) for name in passes},
        }


@dataclass(frozen=True, kw_only=True)
class CudaOpsReport:
    """The result of `measure_cuda_ops`.

    Attributes:
        system: see `describe_system`.
        device: name of the device.
        special_functions_per_s: special functions that the device can compute in a second, from its number of
            multiprocessors and its highest clock rate.
        repeats: timed calls of each function; slow functions have fewer.
        rows: one per operator, shape, batch size and dtype.
    """

    system: dict[str, Any]
    device: str
    special_functions_per_s: float
    repeats: int
    rows: list[CudaRow]

    @property
    def copy_bytes_per_s(self) -> float | None:
        """Highest copy rate of any row."""
        return max((row.copy_bytes_per_s for row in self.rows if row.copy_bytes_per_s), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "system": self.system,
            "device": self.device,
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "special_functions_per_s": self.special_functions_per_s,
            "repeats": self.repeats,
            "rows": [row.as_dict() for row in self.rows],
        }


def plan_rows(
    cases: Sequence[ScanCase], batches: Sequence[int] | None = None, dtypes: Sequence[str] = ("bfloat16",)
) -> list[CudaRow]:
    """Return the empty rows of a benchmark.

    Args:
        cases: the shapes.
        batches: batch sizes of all shapes; by default each shape has its own.
        dtypes: out of `DTYPES`.

    Raises:
        UsageError: an unknown dtype or a batch size that is not positive.
    """
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise UsageError(f"expected dtypes out of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if batches is not None and min(batches) < 1:
        raise UsageError(f"batches must be at least 1, got {min(batches)}")
    return [
        CudaRow(operator=operator.name, case=case, batch=batch, dtype=dtype)
        for case in cases
        for batch in batches or _default_batches(case)
        for operator in (MAP_OPERATORS if case.directions else SEQUENCE_OPERATORS)
        for dtype in dtypes
    ]


def measure_cuda_ops(
    rows: Sequence[CudaRow],
    device: Device,
    *,
    repeats: int = 15,
    parts: Sequence[str] = PARTS,
    on_step: Callable[[str], None] = lambda _: None,
) -> CudaOpsReport:
    """Measure the operators on a device.

    Args:
        rows: what to measure, from `plan_rows`; the measurements are written into them.
        device: the device.
        repeats: timed calls of each function.
        parts: out of `PARTS`.
        on_step: called with a short text after each row.

    Raises:
        UsageError: an unknown part, or `repeats` is not positive.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"expected parts out of {', '.join(PARTS)} on cuda, got {', '.join(unknown)}")
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    for row in rows:
        try:
            _measure_row(row, device, repeats, parts)
        except Exception as error:  # such as lack of memory: the other rows go on
            row.error = describe_failure(error)[1]
        on_step(f"{row.operator}, {row.case.name}, batch {row.batch}")
    return CudaOpsReport(
        system=describe_system(),
        device=device.name,
        special_functions_per_s=device.special_functions_per_s,
        repeats=repeats,
        rows=list(rows),
    )


def _measure_row(row: CudaRow, device: Device, repeats: int, parts: Sequence[str]) -> None:
    operator = OPERATORS[row.operator]
    inputs = operator.make_inputs(row.case, row.batch, getattr(torch, row.dtype), device.torch_device)
    start = time.perf_counter()
    output = _forward(operator, inputs)
    device.synchronize()
    row.first_call_s[FORWARD] = time.perf_counter() - start
    passes: dict[str, Callable[[], object]] = {
        FORWARD: partial(_forward, operator, inputs),
        FORWARD_BACKWARD: _forward_backward(operator, inputs, torch.randn_like(output)),
    }
    start = time.perf_counter()
    passes[FORWARD_BACKWARD]()
    device.synchronize()
    row.first_call_s[FORWARD_BACKWARD] = time.perf_counter() - start
    row.input_bytes, row.output_bytes = sum(t.nbytes for t in inputs), output.nbytes
    del output
    if "memory" in parts:
        row.peak_bytes = {name: device.peak_bytes(function) for name, function in passes.items()}
    if "time" in parts:
        row.times = time_interleaved(passes | {COPY: device.copy}, repeats=repeats, timer=device.seconds)
        row.copy_bytes_per_s = 2 * device.copy_bytes / (row.times[COPY].median_ms / 1000)
        _add_floors(row, device.special_functions_per_s)


def _add_floors(row: CudaRow, special_functions_per_s: float) -> None:
    """Compute the floors of both passes.

    The backward reads the inputs and the gradient of the output and writes the gradients of the inputs. It
    computes the special functions again, because none of their values is saved.
    """
    assert row.copy_bytes_per_s is not None
    forward_bytes = row.input_bytes + row.output_bytes
    backward_bytes = 2 * row.input_bytes + row.output_bytes
    special_functions = row.batch * OPERATORS[row.operator].special_functions(row.case)
    for name, moved, computed in (
        (FORWARD, forward_bytes, special_functions),
        (FORWARD_BACKWARD, forward_bytes + backward_bytes, 2 * special_functions),
    ):
        row.copy_floor_ms[name] = 1000 * moved / row.copy_bytes_per_s
        row.special_function_floor_ms[name] = 1000 * computed / special_functions_per_s


def _forward(operator: Operator, inputs: Sequence[Tensor]) -> Tensor:
    with torch.inference_mode():
        return operator.run(*inputs)


def _forward_backward(
    operator: Operator, inputs: Sequence[Tensor], grad_output: Tensor
) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_() for t in inputs]

    def run() -> object:
        return torch.autograd.grad(operator.run(*leaves), leaves, grad_output)

    return run


def _default_batches(case: ScanCase) -> tuple[int, ...]:
    return _VMAMBA_BATCHES if case.directions else _VIM_BATCHES.get(case.length, (1,))


def _scan_special_functions(case: ScanCase, directions: int = 1) -> int:
    """Count the special functions of a scan of one image.

    Two of softplus and one exponential per state for each scanned channel and position; two of the gate for
    each output.
    """
    scanned = case.length * case.dim * (case.directions or directions)
    gate = 0 if case.directions else 2 * case.length * case.dim
    return scanned * (2 + case.state_dim) + gate


def _case_inputs(case: ScanCase, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return case.inputs(batch, dtype=dtype, device=device)


def _projected_inputs(case: ScanCase, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return x, the low-rank projection of dt with B and C, the weight of dt, A, D and delta_bias."""
    normal, rank = random_normal(dtype, device), math.ceil(case.dim / 16)
    A, skip, bias = case.parameters(case.directions, case.dim, device=device)
    pixels = (batch, case.height, case.width)
    projected = normal(*pixels, case.directions, rank + 2 * case.state_dim)
    weight = (normal(case.directions, case.dim, rank) / rank**0.5).transpose(1, 2)
    return [normal(*pixels, case.dim), projected, weight, A, skip, bias]


def _bidirectional_inputs(
    case: ScanCase, batch: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return the inputs of both directions; the gate is shared."""
    normal = random_normal(dtype, device)
    A, skip, bias = case.parameters(2 * case.dim, device=device)
    u, delta = normal(2, batch, case.length, 2 * case.dim).transpose(2, 3)
    B, C = normal(2, batch, case.length, 2, case.state_dim).permute(0, 1, 3, 4, 2)
    gate = normal(batch, case.length, case.dim).transpose(1, 2)
    return [u, delta, A, B, C, skip, gate, bias]


def _conv_inputs(case: ScanCase, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    normal = random_normal(dtype, device)
    tokens = normal(batch, case.length, case.dim)
    return [tokens.transpose(1, 2), normal(2, case.dim, _CONV_WIDTH), normal(2, case.dim)]


# The operators of VMamba's cases and of Vim's; a new one needs a line here.
MAP_OPERATORS = (
    Operator(
        name="cross_scan",
        make_inputs=_case_inputs,
        run=cross_scan,
        special_functions=_scan_special_functions,
    ),
    Operator(
        name="projected_cross_scan",
        make_inputs=_projected_inputs,
        run=projected_cross_scan,
        special_functions=_scan_special_functions,
    ),
)
SEQUENCE_OPERATORS = (
    Operator(
        name="selective_scan",
        make_inputs=_case_inputs,
        run=partial(scan, delta_softplus=True),
        special_functions=_scan_special_functions,
    ),
    Operator(
        name="bidirectional_scan",
        make_inputs=_bidirectional_inputs,
        run=partial(bidirectional_scan, delta_softplus=True),
        special_functions=partial(_scan_special_functions, directions=2),
    ),
    Operator(
        name="causal_conv1d",
        make_inputs=_conv_inputs,
        run=partial(causal_conv1d, silu=True, reverse=(False, True)),
        # The exponential and the reciprocal of SiLU, in both directions.
        special_functions=lambda case: 4 * case.length * case.dim,
    ),
)
OPERATORS = {operator.name: operator for operator in (*MAP_OPERATORS, *SEQUENCE_OPERATORS)}
