"""Recording of scans and softmax attention while a network runs, without changes to the model."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightspine.ops.cross_scan import unfused_projection

OPERATORS: dict[Any, str] = {
    torch.ops.lightspine.cross_scan: "cross_scan",
    torch.ops.lightspine.cross_scan.default: "cross_scan",
    torch.ops.lightspine.selective_scan: "selective_scan",
    torch.ops.lightspine.selective_scan.default: "selective_scan",
    F.scaled_dot_product_attention: "softmax",
}
"""Recorded functions, each with the `kind` of its calls."""


@dataclass(frozen=True)
class OpCall:
    """One call of a recorded operator.

    Attributes:
        module: name of the innermost module that made the call.
        kind: "cross_scan", "selective_scan" or "softmax".
        args: positional arguments, tensors detached.
        kwargs: keyword arguments, tensors detached.
        output: the output, or the first of several, detached.
    """

    module: str
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class OpRecorder(TorchFunctionMode):
    """Context manager that calls a function after every scan and softmax attention of a network.

    Args:
        network: the network whose module names the calls get.
        on_call: receives the call; a returned tensor replaces the output, `None` keeps it.
    """

    def __init__(self, network: nn.Module, on_call: Callable[[OpCall], Tensor | None]) -> None:
        super().__init__()
        self.network = network
        self.on_call = on_call
        self._module_stack: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "OpRecorder":
        """Register the hooks."""
        for name, module in self.network.named_modules():

            def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
                self._module_stack.append(name)

            def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
                self._module_stack.pop()

            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._unfused = unfused_projection()
        self._unfused.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        super().__exit__(kind, error, trace)
        self._unfused.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch and report its call if it is a recorded operator."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = OPERATORS.get(func) if callable(func) else None
        if kind is None:
            return result
        output = result[0] if isinstance(result, tuple) else result
        call = OpCall(
            self._module_stack[-1] if self._module_stack else "",
            kind,
            tuple(_detach(value) for value in args),
            {key: _detach(value) for key, value in kwargs.items()},
            output.detach(),
        )
        replaced = self.on_call(call)
        if replaced is None:
            return result
        return (replaced, *result[1:]) if isinstance(result, tuple) else replaced


def record_calls(network: nn.Module, pixels: Tensor) -> list[OpCall]:
    """Run a network on images without gradients and return its calls of recorded operators, in order."""
    calls: list[OpCall] = []

    def record(call: OpCall) -> None:
        calls.append(call)

    with torch.no_grad(), OpRecorder(network, record):
        network(pixels)
    return calls


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
