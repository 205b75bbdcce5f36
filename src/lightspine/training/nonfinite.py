"""Non-finite losses and gradients (NaN, infinity): skip the step and trace the module that caused it."""

import logging
from collections.abc import Iterable, Iterator
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

    Call `start` when training begins, `check_loss` with every loss, and `check_step` when the gradients are
    accumulated and unscaled but not yet clipped (Lightning's `on_before_optimizer_step`). A skipped step
    changes neither the weights, nor the buffers (BatchNorm statistics), nor the optimizer state; the
    learning-rate schedule advances. In distributed training all ranks skip the step together.

    On a CPU every step is read at once. On other devices a read would wait for the device and leave it
    without work. There the fused optimizer skips the step on the device (`found_inf`, as under PyTorch's
    gradient scaler), and the guard reads the results of many steps together: every `read_every` steps, and
    when `read` is called. After a bad step it reads every step, until `read_every` steps in a row were good,
    so that the cause of the next one can be traced. It always reads every step of an optimizer without a
    fused implementation, and with a gradient scaler, which reads every step itself.

    Args:
        max_bad_steps: number of consecutive non-finite steps after which the run stops.
        deferred: read the results of many steps together. Default: on all devices but the CPU.

    Attributes:
        skipped: number of skipped steps, as of the last read.
        in_a_row: number of consecutive skipped steps, as of the last read.

    Raises:
        UsageError: `max_bad_steps` is below 1.
    """

    def __init__(self, max_bad_steps: int = 10, *, deferred: bool | None = None) -> None:
        if max_bad_steps < 1:
            raise UsageError(f"expected max_bad_steps of at least 1, got {max_bad_steps}")
        self.max_bad_steps = max_bad_steps
        self.deferred = deferred
        self.skipped = 0
        self.in_a_row = 0
        self._read_every = 1
        # Steps that are still to be read one by one.
        self._watched = 0
        # Result of every step since the last read, on the device, and descriptions of these steps.
        self._results: Tensor | None = None
        self._unread: list[str] = []
        self._bad_loss: Tensor | None = None
        self._forward: RecordedForward | None = None
        self._buffers: _GoodBuffers | None = None

    def start(self, module: nn.Module, *, read_every: int = 50) -> None:
        """Copy the buffers of the model before the first step.

        Args:
            module: the model.
            read_every: number of steps whose results are read together; see the class.
        """
        self._buffers = _GoodBuffers(module)
        self._read_every = max(1, read_every)

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

    def check_step(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: Any = None,
        where: str = "",
    ) -> None:
        """Make the optimizer skip its next step if the loss or a gradient is not finite.

        Args:
            module: the model whose gradients are checked.
            optimizer: the optimizer that is about to update the model.
            scaler: the gradient scaler of 16-mixed precision.
            where: description of the step for messages, such as "step 17 (epoch 1), learning rate 0.001".

        Raises:
            LightspineError: the last `max_bad_steps` steps were non-finite.
        """
        skips: Any = optimizer  # `found_inf` and `_step_supports_amp_scaling` are no part of the type
        flags = self._check_all_ranks(p for group in optimizer.param_groups for p in group["params"])
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        deferred = flags.device.type != "cpu" if self.deferred is None else self.deferred
        if not deferred or not fused or scaler is not None or self._watched:
            if fused and scaler is None:
                skips.found_inf = None
            good = self._finish_step(module, flags, scaler=scaler, where=where)
            if self._watched:
                self._watched = self._watched - 1 if good else self._read_every
            return
        assert self._buffers is not None, "call start before the first step"
        bad = flags.to(torch.bool).any()
        skips.found_inf = bad.float()
        self._buffers.restore_where(bad)
        if self._results is None:
            self._results = torch.zeros(self._read_every, 2, dtype=torch.uint8, device=flags.device)
        self._results[len(self._unread)].copy_(flags)
        self._unread.append(where)
        forward, self._forward, self._bad_loss = self._forward, None, None
        if len(self._unread) == self._read_every:
            self._read(module, forward)

    def check_gradients(self, module: nn.Module, *, scaler: Any = None, where: str = "") -> bool:
        """Return whether loss and gradients are finite; if not, set all gradients to None.

        Optimizers skip parameters whose gradient is None. Waits for the device; see `check_step`.

        Args:
            module: the model whose gradients are checked.
            scaler: the gradient scaler of 16-mixed precision. It skips steps with infinite gradients itself,
                so such a step counts as non-finite only if the scale is below 1.
            where: description of the step for messages, such as "step 17 (epoch 1), learning rate 0.001".

        Raises:
            LightspineError: the last `max_bad_steps` steps were non-finite.
        """
        flags = self._check_all_ranks(module.parameters())
        return self._finish_step(module, flags, scaler=scaler, where=where)

    def read(self) -> None:
        """Read the results of the steps since the last read: count and report the skipped ones.

        Call it before `skipped` is used or a checkpoint is written. Waits for the device.

        Raises:
            LightspineError: `max_bad_steps` consecutive steps were non-finite.
        """
        self._read(None, None)

    def state_dict(self) -> dict[str, int]:
        """Return the counters for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counters from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _finish_step(self, module: nn.Module, flags: Tensor, *, scaler: Any, where: str) -> bool:
        """Read the flags of a step; if one is set, restore the buffers and set all gradients to None."""
        bad_loss, bad_gradient = flags.tolist()
        self._bad_loss = None
        forward, self._forward = self._forward, None
        if not bad_loss and not bad_gradient:
            self.in_a_row = 0
            if self._buffers is not None:
                self._buffers.save()
            return True
        if not bad_loss and scaler is not None and scaler.get_scale() >= 1:
            _drop_gradients(module)
            return False
        cause = _first_over_ranks(trace_forward(forward) if bad_loss else trace_gradients(module))
        if self._buffers is not None:
            self._buffers.restore()
        _drop_gradients(module)
        self.skipped += 1
        self.in_a_row += 1
        message = _describe_step(bad_loss, where, cause)
        if self.in_a_row >= self.max_bad_steps:
            raise LightspineError(f"{self.in_a_row} non-finite steps in a row; last: {message}; {_ADVICE}")
        _log.warning("skipped a step: %s", message)
        return False

    def _read(self, module: nn.Module | None, forward: "RecordedForward | None") -> None:
        """Read the unread results.

        Args:
            module: the model with the gradients of the last step, to trace its cause, or None.
            forward: forward pass of the last step, or None.
        """
        if not self._unread:
            return
        assert self._results is not None
        results, steps = self._results[: len(self._unread)].tolist(), self._unread
        self._unread = []
        bad = [step for step, flags in enumerate(results) if any(flags)]
        longest = 0
        for flags in results:
            self.in_a_row = self.in_a_row + 1 if any(flags) else 0
            longest = max(longest, self.in_a_row)
        if not bad:
            return
        self.skipped += len(bad)
        bad_loss = bool(results[bad[0]][0])
        cause = None
        # The last step can still be traced: it was skipped, so its weights are unchanged.
        if any(results[-1]) and module is not None:
            cause = _first_over_ranks(trace_forward(forward) if results[-1][0] else trace_gradients(module))
        if len(bad) == 1:
            message = f"skipped a step: {_describe_step(bad_loss, steps[bad[0]], cause)}"
        else:
            message = f"skipped {len(bad)} steps; first: {_describe_step(bad_loss, steps[bad[0]], None)}"
            if cause:
                message += f"; last: {cause}"
        if longest >= self.max_bad_steps:
            raise LightspineError(f"{longest} non-finite steps in a row; {message}; {_ADVICE}")
        _log.warning("%s", message)
        self._watched = self._read_every

    def _check_all_ranks(self, parameters: Iterable[Tensor]) -> Tensor:
        """All-reduce the non-finite flags of loss and gradients over all ranks; return two uint8 values."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        device = norm.device if self._bad_loss is None else self._bad_loss.device
        bad_gradient = ~torch.isfinite(norm.detach().to(device))
        bad_loss = torch.zeros_like(bad_gradient) if self._bad_loss is None else self._bad_loss
        flags = torch.stack([bad_loss, bad_gradient]).to(torch.uint8)
        if _is_distributed():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return flags


class _GoodBuffers:
    """Copy of the buffers of a model after its last good step, in one tensor per dtype and device."""

    def __init__(self, module: nn.Module) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in module.buffers():
            groups.setdefault((buffer.dtype, buffer.device), []).append(buffer.detach())
        self._groups = [(buffers, _flatten(buffers)) for buffers in groups.values()]

    def save(self) -> None:
        """Copy the buffers of the model."""
        for buffers, copy in self._groups:
            torch._foreach_copy_(_split_like(copy, buffers), buffers)

    def restore(self) -> None:
        """Copy the saved values back to the model."""
        for buffers, copy in self._groups:
            torch._foreach_copy_(buffers, _split_like(copy, buffers))

    def restore_where(self, bad: Tensor) -> None:
        """Restore the buffers if `bad`, a boolean scalar on the device, is true; else save them."""
        for buffers, copy in self._groups:
            # Not a product: NaN times zero is NaN.
            copy.copy_(torch.where(bad, copy, _flatten(buffers)))
        self.restore()


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


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split_like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Split a flat tensor into views of the shapes of the given tensors (the inverse of concatenation)."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _describe_step(bad_loss: bool, where: str, cause: str | None) -> str:
    what = "loss" if bad_loss else "gradient"
    return f"non-finite {what}{' at ' + where if where else ''}{'; ' + cause if cause else ''}"


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
