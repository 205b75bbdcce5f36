"""How long a scan takes, next to the arithmetic that no implementation can do without."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.benchmark.ops_cases import ScanCase
from lightspine.benchmark.turns import Timing, time_in_turns

FLOOR, REFERENCE, BLOCKED, SCAN = "floor", "reference", "torch", "scan"
BLOCKED_TRAINING, SCAN_TRAINING = "torch, forward and backward", "scan, forward and backward"


def time_scan(case: ScanCase, batch: int, repeats: int) -> dict[str, Timing]:
    """Time a scan and what it is compared with, in turns.

    Args:
        case: the shape.
        batch: images or sequences.
        repeats: timed calls of each.

    Returns:
        By name: `FLOOR`, PyTorch's softplus over (B, K D, L) and exp over (B, K D, L, N), into memory that is
        there already; `SCAN`, the backend that "auto" takes; `BLOCKED`, the backend "torch"; `SCAN_TRAINING`,
        the first with the gradients of all inputs. In a batch of 1 also what takes seconds, in proportion to
        the batch: `BLOCKED_TRAINING`, and `REFERENCE`, the loop that defines the scan.
    """
    inputs = case.inputs(batch)
    functions: dict[str, Callable[[], object]] = {
        SCAN: _forward(case, "auto", inputs),
        FLOOR: _floor(case, batch),
        BLOCKED: _forward(case, "torch", inputs),
        SCAN_TRAINING: _training(case, "auto", inputs),
    }
    if batch == 1:
        functions[BLOCKED_TRAINING] = _training(case, "torch", inputs)
        functions[REFERENCE] = _forward(case, "reference", inputs)
    return time_in_turns(functions, repeats=repeats)


def _floor(case: ScanCase, batch: int) -> Callable[[], object]:
    steps = torch.randn(batch, case.channels, case.length)
    decays = -torch.rand(batch, case.channels, case.length, case.state_dim)
    steps_out, decays_out = torch.empty_like(steps), torch.empty_like(decays)

    def run() -> None:
        with torch.inference_mode():
            F.softplus(steps, out=steps_out)  # type: ignore[call-arg]
            torch.exp(decays, out=decays_out)

    return run


def _forward(case: ScanCase, backend: str, inputs: list[Tensor]) -> Callable[[], object]:
    operator = case.operator(backend)

    def run() -> Tensor:
        with torch.inference_mode():
            return operator(*inputs)

    return run


def _training(case: ScanCase, backend: str, inputs: list[Tensor]) -> Callable[[], object]:
    operator = case.operator(backend)
    leaves = [t.detach().requires_grad_() for t in inputs]
    weights: list[Tensor] = []

    def run() -> object:
        out = operator(*leaves)
        if not weights:
            weights.append(torch.randn_like(out))
        return torch.autograd.grad(out, leaves, weights[0])

    return run
