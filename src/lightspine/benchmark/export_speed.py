"""Exported models beside PyTorch: how fast ONNX Runtime runs them, measured in turns."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from lightspine.benchmark.system import describe_system
from lightspine.benchmark.turns import Timing, time_in_turns
from lightspine.errors import UsageError
from lightspine.export.check import open_session
from lightspine.export.onnx_file import export_onnx
from lightspine.models.factory import create_model
from lightspine.models.registry import get_record
from lightspine.optimize.folding import optimize

EAGER, OPTIMIZED, ONNX, TIMM = "eager", "optimized", "onnx", "timm onnx"
SMALL_MODELS = ("shvit_s1", "efficientvim_m1", "efficientmod_xxs", "vim_tiny", "vmamba_tiny")
_SCANNING = ("vim", "vmamba")


@dataclass(frozen=True, kw_only=True)
class ExportRow:
    """One model with one batch.

    Attributes:
        model: its name.
        batch: images at a time.
        times: by what was timed: "eager", "optimized" (eager), "onnx", and "timm onnx" where timm has it.
        bytes: size of our file.
        weight_bytes: what the parameters take.
    """

    model: str
    batch: int
    times: dict[str, Timing]
    bytes: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """A target beside what was measured.

    Attributes:
        where: model and batch.
        what: the quotient, or the share.
        value: as measured.
        rule: ">=" or "<=".
        limit: of the target.
    """

    where: str
    what: str
    value: float
    rule: str
    limit: float

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.limit if self.rule == ">=" else self.value <= self.limit


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `measure_export` found.

    Attributes:
        system: see `describe_system`.
        threads: of PyTorch and of ONNX Runtime.
        size: (height, width) of the images.
        rows: one per model and batch.
    """

    system: dict[str, Any]
    threads: int
    size: tuple[int, int]
    rows: list[ExportRow] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        """The targets: no slower than timm's export, faster than eager, no larger than the weights."""
        return [check for row in self.rows for check in _checks(row)]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self) | {"checks": [asdict(check) | {"met": check.met} for check in self.checks]}


def measure_export(
    names: Sequence[str] = SMALL_MODELS,
    batches: Sequence[int] = (1, 8),
    *,
    threads: int = 2,
    repeats: int = 15,
    size: tuple[int, int] = (224, 224),
    on_step: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Time each model with random weights in PyTorch, optimised, and as an ONNX file in ONNX Runtime.

    Where timm has the same model, timm's is exported in the same way, to be timed beside ours.

    Args:
        names: registered names.
        batches: images at a time.
        threads: of PyTorch and of ONNX Runtime.
        repeats: timed calls of each.
        size: (height, width) of the images.
        on_step: called with the name of each model when it is done.

    Raises:
        UsageError: an unknown name, or nothing to time.
    """
    if not names or not batches or min(batches) < 1 or repeats < 1 or threads < 1:
        raise UsageError(
            "expected models, batches, repeats and threads of at least 1, "
            f"got {list(names)}, {list(batches)}, {repeats} and {threads}"
        )
    records = [get_record(name) for name in names]
    report = ExportReport(system=describe_system(), threads=threads, size=size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for record in records:
            report.rows.extend(_measure(record.name, batches, threads, repeats, size))
            on_step(record.name)
    finally:
        torch.set_num_threads(before)
    return report


def _measure(
    name: str, batches: Sequence[int], threads: int, repeats: int, size: tuple[int, int]
) -> list[ExportRow]:
    model = _as_trained(create_model(name).eval())
    optimized = optimize(model)
    shapes = [(1, *size)]
    with tempfile.TemporaryDirectory() as folder:
        written = export_onnx(model, Path(folder) / "ours.onnx", shapes=shapes)
        sessions = {ONNX: open_session(written.path, threads)}
        if timm.is_model(name) and not timm.model_entrypoint(name).__module__.startswith("lightspine"):
            peer = _as_trained(timm.create_model(name).eval())
            export_onnx(peer, Path(folder) / "timm.onnx", shapes=shapes)
            sessions[TIMM] = open_session(Path(folder) / "timm.onnx", threads)
        rows = []
        for batch in batches:
            images = torch.randn(batch, 3, *size)
            calls: dict[str, Callable[[], object]] = {
                EAGER: partial(model, images),
                OPTIMIZED: partial(optimized, images),
            }
            for what, session in sessions.items():
                calls[what] = partial(session.run, None, {session.get_inputs()[0].name: images.numpy()})
            with torch.inference_mode():
                times = time_in_turns(calls, repeats=repeats, calls_per_turn=3)
            rows.append(
                ExportRow(
                    model=name,
                    batch=batch,
                    times=times,
                    bytes=written.bytes,
                    weight_bytes=written.weight_bytes,
                )
            )
        return rows


def _as_trained(model: nn.Module) -> nn.Module:
    """Change each weight a little: ones and zeros of new layers would be taken out of the file."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def _checks(row: ExportRow) -> list[Check]:
    ms = {what: timing.median_ms for what, timing in row.times.items()}
    where = f"{row.model}, batch {row.batch}"
    found = [
        Check(
            where=where,
            what="file / weights",
            value=row.bytes / row.weight_bytes,
            rule="<=",
            limit=1.03,
        )
    ]
    faster = Check(where=where, what="eager / onnx", value=ms[EAGER] / ms[ONNX], rule=">=", limit=1.0)
    if row.model.startswith(_SCANNING):
        found.append(faster)
    elif row.batch == 1:
        found.append(Check(where=where, what="eager / onnx", value=faster.value, rule=">=", limit=1.5))
    if TIMM in ms:
        found.append(
            Check(where=where, what="timm onnx / onnx", value=ms[TIMM] / ms[ONNX], rule=">=", limit=1.0)
        )
    return found
