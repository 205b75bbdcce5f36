"""How long the forward pass of each module takes, with and without the modules inside of it."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch.nn as nn


@dataclass(frozen=True, kw_only=True)
class ModuleTime:
    """One module, in milliseconds of one pass.

    Attributes:
        name: its path in the model; "" for the model itself.
        kind: its class.
        total_ms: from its call to its return.
        own_ms: that without the modules that it called.
        calls: in one pass.
    """

    name: str
    kind: str
    total_ms: float
    own_ms: float
    calls: int


@dataclass
class _Open:
    """A module that has been called and has not returned."""

    start: float
    inside: float = 0.0


class _Recorder:
    """Notes when modules are called and return; they return in the opposite order."""

    def __init__(self, clock: Callable[[], float], wait: Callable[[], object]):
        self._clock, self._wait = clock, wait
        self._open: list[_Open] = []
        self.passes: list[dict[str, list[float]]] = []

    def new_pass(self) -> None:
        # Total, own and calls.
        self.passes.append(defaultdict(lambda: [0.0, 0.0, 0]))

    def called(self, *_: object) -> None:
        self._wait()
        self._open.append(_Open(self._clock()))

    def returned(self, name: str, *_: object) -> None:
        self._wait()
        module = self._open.pop()
        elapsed = self._clock() - module.start
        entry = self.passes[-1][name]
        entry[0] += elapsed
        entry[1] += elapsed - module.inside
        entry[2] += 1
        if self._open:
            self._open[-1].inside += elapsed


def measure_modules(
    model: nn.Module,
    run: Callable[[], object],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] = lambda: None,
) -> list[ModuleTime]:
    """Time every module that is called, the slowest first.

    The hooks take time too, some microseconds for each module, which falls on the module around it.

    Args:
        model: its modules are watched.
        run: runs the model once.
        repeats: passes, whose median is told.
        clock: returns seconds.
        wait: returns when an accelerator has done what it was given, so that its time falls on the right
            module.
    """
    recorder = _Recorder(clock, wait)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    with _watched(model, recorder):
        for _ in range(repeats):
            recorder.new_pass()
            run()
    names = dict.fromkeys(name for entries in recorder.passes for name in entries)
    found = [
        ModuleTime(
            name=name,
            kind=kinds[name],
            total_ms=1000 * statistics.median(entries[name][0] for entries in recorder.passes),
            own_ms=1000 * statistics.median(entries[name][1] for entries in recorder.passes),
            calls=int(recorder.passes[-1][name][2]),
        )
        for name in names
    ]
    return sorted(found, key=lambda module: -module.total_ms)


@contextmanager
def _watched(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(recorder.called))
            handles.append(module.register_forward_hook(partial(recorder.returned, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
