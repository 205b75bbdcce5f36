"""Non-finite losses and gradients (NaN, infinity): skip the step and trace the module that caused it."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightspine.errors import LightspineError, UsageError

_log = logging.getLogger(__name__)

_ADVICE = (
    "lower the learning rate, lengthen the warm-up, clip the gradient (or clip it harder), "
    "or train in 32-true or bf16-mixed instead of 16-mixed"
)


class NonFiniteGuard:
    """Skips optimizer steps whose loss or gradient is NaN or infinite.

    Call `start` when training begins, `check_loss` with every loss, and `check_gradients` when the gradients
    are accumulated and unscaled but not yet clipped (Lightning's `on_before_optimizer_step`). A skipped step
    changes neither the weights, nor the buffers (BatchNorm statistics), nor the optimizer state; the
    learning-rate schedule advances. In distributed training all ranks skip the step together.

    Args:
        max_bad_steps: number of consecutive non-finite steps after which the run stops.

    Attributes:
        skipped: number of skipped steps.
        in_a_row: number of consecutive skipped steps up to now.

    Raises:
        UsageError: `max_bad_steps` is below 1.
    """

    def __init__(self, max_bad_steps: int = 10) -> None:
        if max_bad_steps < 1:
            raise UsageError(f"expected max_bad_steps of at least 1, got {max_bad_steps}")
        self.max_bad_steps = max_bad_steps
        self.skipped = 0
        self.in_a_row = 0
        self._bad_loss: Tensor | None = None
        self._forward: RecordedForward | None = None
        self._good_buffers: list[Tensor] = []

    def start(self, module: nn.Module) -> None:
        """Copy the buffers of the model before the first step."""
        self._good_buffers = [buffer.detach().clone() for buffer in module.buffers()]

    def check_loss(self, loss: Tensor, module: nn.Module, *inputs: Any) -> None:
        """Record whether a loss is finite, without synchronizing the device.

        Args:
            loss: scalar loss.
            module: the model that produced it.
            *inputs: the inputs of the model, images first. They are needed to trace the first module with a
                non-finite output.
        """
        bad = ~torch.isfinite(loss.detach())
        # With gradient accumulation one step has several losses.
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        if inputs:
            self._forward = RecordedForward(module, *inputs)

    def check_gradients(self, module: nn.Module, *, scaler: Any = None, where: str = "") -> bool:
        """Return whether loss and gradients are finite; if not, set all gradients to None.

        Optimizers skip parameters whose gradient is None.

        Args:
            module: the model whose gradients are checked.
            scaler: the gradient scaler of 16-mixed precision. It skips steps with infinite gradients itself,
                so such a step counts as non-finite only if the scale is below 1.
            where: description of the step for messages, such as "step 17 (epoch 1), learning rate 0.001".

        Raises:
            LightspineError: the last `max_bad_steps` steps were non-finite.
        """
        bad_loss, bad_gradient = self._check_all_ranks(module)
        self._bad_loss = None
        forward, self._forward = self._forward, None
        if not bad_loss and not bad_gradient:
            self.in_a_row = 0
            for good, buffer in zip(self._good_buffers, module.buffers(), strict=True):
                good.copy_(buffer)
            return True
        if not bad_loss and scaler is not None and scaler.get_scale() >= 1:
            _drop_gradients(module)
            return False
        what = "loss" if bad_loss else "gradient"
        cause = _first_over_ranks(trace_forward(forward) if bad_loss else trace_gradients(module))
        for good, buffer in zip(self._good_buffers, module.buffers(), strict=True):
            buffer.copy_(good)
        _drop_gradients(module)
        self.skipped += 1
        self.in_a_row += 1
        message = f"non-finite {what}{' at ' + where if where else ''}{'; ' + cause if cause else ''}"
        if self.in_a_row >= self.max_bad_steps:
            raise LightspineError(f"{self.in_a_row} non-finite steps in a row; last: {message}; {_ADVICE}")
        _log.warning("skipped a step: %s", message)
        return False

    def state_dict(self) -> dict[str, int]:
        """Return the counters for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counters from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _check_all_ranks(self, module: nn.Module) -> tuple[bool, bool]:
        """Return whether the loss and the gradients are non-finite on any rank."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        device = norm.device if self._bad_loss is None else self._bad_loss.device
        bad_gradient = ~torch.isfinite(norm.detach().to(device))
        bad_loss = torch.zeros_like(bad_gradient) if self._bad_loss is None else self._bad_loss
        flags = torch.stack([bad_loss, bad_gradient]).to(torch.uint8)
        if _is_distributed():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        loss_flag, gradient_flag = flags.tolist()
        return bool(loss_flag), bool(gradient_flag)


class RecordedForward:
    """A forward pass that can be repeated under the same autocast settings.

    Args:
        module: the model.
        *inputs: its inputs, images first: one tensor, or a list of tensors.
    """

    def __init__(self, module: nn.Module, *inputs: Any) -> None:
        self.module = module
        self.inputs = inputs
        self.device = next(_tensors(inputs)).device
        kind = self.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def run_again(self) -> None:
        """Repeat the forward pass uncompiled and without gradients; the random state is left unchanged."""
        kind, dtype, enabled = self._autocast
        devices = [self.device] if kind == "cuda" else []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            torch.autocast(kind, dtype, enabled=enabled),
            torch.compiler.set_stance("force_eager"),
        ):
            self.module(*self.inputs)


def trace_forward(forward: RecordedForward | None) -> str | None:
    """Return a phrase that names the cause of a non-finite loss, or None if the forward was not recorded.

    Args:
        forward: the forward pass that produced the loss.
    """
    if forward is None:
        return None
    if not all(_is_finite(images) for images in _tensors(forward.inputs[0])):
        return "the input images are not finite"
    for name, parameter in forward.module.named_parameters():
        if not _is_finite(parameter):
            return f"the weight {name} is not finite"
    first: list[str] = []

    def record_first(name: str, output: Any) -> None:
        if not first and not all(_is_finite(tensor) for tensor in _tensors(output)):
            first.append(name)

    # The hook of a submodule runs before that of its parent, so the innermost module is recorded.
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: record_first(name, output))
        for name, module in forward.module.named_modules()
    ]
    try:
        forward.run_again()
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        return "the output of the model is finite, but the loss is not"
    return f"the first module with a non-finite output is {first[0] or 'the whole model'}"


def trace_gradients(module: nn.Module) -> str | None:
    """Return a phrase that names the first parameter with a non-finite gradient, or None."""
    # The backward pass runs from the last module to the first, so the last bad gradient came first.
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    return f"the first parameter with a non-finite gradient is {bad[-1]}" if bad else None


def _drop_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _first_over_ranks(found: str | None) -> str | None:
    """All-gather the traces and return the first that is not None."""
    if not _is_distributed():
        return found
    traces: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(traces, found)
    return next((trace for trace in traces if trace), None)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
