"""Watching the operators that mix positions, from outside: no model is changed or copied for it."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OPERATORS: dict[Any, str] = {
    torch.ops.lightspine.cross_scan: "cross_scan",
    torch.ops.lightspine.cross_scan.default: "cross_scan",
    torch.ops.lightspine.selective_scan: "selective_scan",
    torch.ops.lightspine.selective_scan.default: "selective_scan",
    F.scaled_dot_product_attention: "softmax",
}


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator that mixes positions.

    Attributes:
        module: name of the innermost module that made it.
        kind: "cross_scan", "selective_scan" or "softmax".
        args: positional arguments, tensors detached.
        kwargs: named arguments.
        output: what it returned, the first of several.
    """

    module: str
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class OperatorWatch(TorchFunctionMode):
    """Calls a function after every scan and every softmax attention while a network runs inside it.

    Args:
        network: whose modules' names the calls bear.
        on_call: takes the call and returns the output that the network goes on with; `None` for its own.
    """

    def __init__(self, network: nn.Module, on_call: Callable[[OperatorCall], Tensor | None]) -> None:
        super().__init__()
        self.network = network
        self.on_call = on_call
        self._running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "OperatorWatch":
        """Start to watch."""
        for name, module in self.network.named_modules():

            def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
                self._running.append(name)

            def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
                self._running.pop()

            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, also after an error."""
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run what was called, and tell of it where it is one of the operators."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = OPERATORS.get(func) if callable(func) else None
        if kind is None:
            return result
        output = result[0] if isinstance(result, tuple) else result
        call = OperatorCall(
            self._running[-1] if self._running else "",
            kind,
            tuple(_detached(value) for value in args),
            {key: _detached(value) for key, value in kwargs.items()},
            output.detach(),
        )
        replaced = self.on_call(call)
        if replaced is None:
            return result
        return (replaced, *result[1:]) if isinstance(result, tuple) else replaced


def record_calls(network: nn.Module, pixels: Tensor) -> list[OperatorCall]:
    """Run a network on images without gradients and return its calls, in their order."""
    calls: list[OperatorCall] = []

    def note(call: OperatorCall) -> None:
        calls.append(call)

    with torch.no_grad(), OperatorWatch(network, note):
        network(pixels)
    return calls


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
