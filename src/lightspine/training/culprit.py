"""Which module was the first to give a number that is not finite."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


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


def find_in_forward(forward: Forward | None) -> str | None:
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


def find_in_gradients(module: nn.Module) -> str | None:
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
