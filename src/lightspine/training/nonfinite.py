"""Non-finite losses and gradients: the step is skipped, counted and traced to the module that made it."""

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
    """Keeps a step with a non-finite loss or gradient away from the weights.

    A task calls `start` when training begins, `check_loss` with every loss and `check_gradients` when the
    gradients are complete and unscaled but not yet clipped (Lightning's `on_before_optimizer_step`). A bad
    step leaves weights, buffers (statistics of batch norms) and the state of the optimiser as they were; the
    schedule goes on. All processes of a distributed run skip together.

    Args:
        max_bad_steps: so many bad steps in a row end the run.

    Attributes:
        skipped: bad steps so far.
        in_a_row: bad steps since the last good one.

    Raises:
        UsageError: max_bad_steps below 1.
    """

    def __init__(self, max_bad_steps: int = 10) -> None:
        if max_bad_steps < 1:
            raise UsageError(f"expected max_bad_steps of at least 1, got {max_bad_steps}")
        self.max_bad_steps = max_bad_steps
        self.skipped = 0
        self.in_a_row = 0
        self._bad_loss: Tensor | None = None
        self._forward: Forward | None = None
        self._kept: list[Tensor] = []

    def start(self, module: nn.Module) -> None:
        """Remember the buffers of the network as they are before the first step."""
        self._kept = [buffer.detach().clone() for buffer in module.buffers()]

    def check_loss(self, loss: Tensor, module: nn.Module, *inputs: Any) -> None:
        """Note whether a loss is finite; nothing waits for the device here.

        Args:
            loss: scalar.
            module: the network that it comes from.
            *inputs: what the network was given, the images first; with it the module that was the first to
                give something non-finite can be named.
        """
        bad = ~torch.isfinite(loss.detach())
        # Over the batches whose gradients are accumulated into one step.
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        if inputs:
            self._forward = Forward(module, *inputs)

    def check_gradients(self, module: nn.Module, *, scaler: Any = None, where: str = "") -> bool:
        """Return whether the step may be taken; the gradients of a bad one are dropped.

        Without gradients an optimiser leaves weights and state as they are.

        Args:
            module: the network whose gradients are looked at.
            scaler: the gradient scaler of 16-mixed. It meets infinite gradients in its normal work and skips
                such a step by itself: that counts as bad only when its scale has fallen below 1.
            where: what tells a reader which step it is, such as "step 17 (epoch 1), learning rate 0.001".

        Raises:
            LightspineError: the last of `max_bad_steps` bad steps in a row.
        """
        bad_loss, bad_gradient = self._agree(module)
        self._bad_loss = None
        forward, self._forward = self._forward, None
        if not bad_loss and not bad_gradient:
            self.in_a_row = 0
            for kept, buffer in zip(self._kept, module.buffers(), strict=True):
                kept.copy_(buffer)
            return True
        if not bad_loss and scaler is not None and scaler.get_scale() >= 1:
            _drop_gradients(module)
            return False
        what = "loss" if bad_loss else "gradient"
        found = _first_found(trace_forward(forward) if bad_loss else trace_gradients(module))
        for kept, buffer in zip(self._kept, module.buffers(), strict=True):
            buffer.copy_(kept)
        _drop_gradients(module)
        self.skipped += 1
        self.in_a_row += 1
        sentence = f"non-finite {what}{' at ' + where if where else ''}{'; ' + found if found else ''}"
        if self.in_a_row >= self.max_bad_steps:
            raise LightspineError(f"{self.in_a_row} bad steps in a row, the last: {sentence}; {_ADVICE}")
        _log.warning("skipped a step: %s", sentence)
        return False

    def state_dict(self) -> dict[str, int]:
        """Return the counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the counts of a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _agree(self, module: nn.Module) -> tuple[bool, bool]:
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


def _drop_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _first_found(found: str | None) -> str | None:
    """Return what the first process that found something has found."""
    if not _is_distributed():
        return found
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return next((text for text in everyone if text), None)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class Forward:
    """One pass through a network, kept so that it can be run again under the same autocast.

    Args:
        module: the network.
        *inputs: what it was given, the images first: one tensor, or several in a list.
    """

    def __init__(self, module: nn.Module, *inputs: Any) -> None:
        self.module = module
        self.inputs = inputs
        self.device = next(_tensors(inputs)).device
        kind = self.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def run_again(self) -> None:
        """Run the network as before, uncompiled and without gradients; random numbers stay as they are."""
        kind, dtype, enabled = self._autocast
        devices = [self.device] if kind == "cuda" else []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices),
            torch.autocast(kind, dtype, enabled=enabled),
            torch.compiler.set_stance("force_eager"),
        ):
            self.module(*self.inputs)


def trace_forward(forward: Forward | None) -> str | None:
    """Return a phrase that names what made a loss non-finite, or None where nothing is known.

    Args:
        forward: the pass that led to the loss; None if it was not kept.
    """
    if forward is None:
        return None
    if not all(_is_finite(images) for images in _tensors(forward.inputs[0])):
        return "the images themselves are not finite"
    for name, parameter in forward.module.named_parameters():
        if not _is_finite(parameter):
            return f"the weight {name} is not finite"
    first: list[str] = []

    def note(name: str, output: Any) -> None:
        if not first and not all(_is_finite(tensor) for tensor in _tensors(output)):
            first.append(name)

    # A module ends before the one that contains it: the innermost is noted.
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in forward.module.named_modules()
    ]
    try:
        forward.run_again()
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        return "the output of the model is finite, so it is the loss itself"
    return f"the first module with a non-finite output is {first[0] or 'the model itself'}"


def trace_gradients(module: nn.Module) -> str | None:
    """Return a phrase that names where the backward pass became non-finite, or None."""
    # The backward pass runs from the last module to the first, so the last bad gradient was the first.
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    return f"the first parameter with a non-finite gradient is {bad[-1]}" if bad else None


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)
