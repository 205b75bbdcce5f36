"""Which share of a model's forward pass its scans take."""

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "lightspine.forward"


@dataclass(frozen=True, kw_only=True)
class ScanShare:
    """Time of a forward pass and of the scans in it, under the profiler.

    Attributes:
        forward_ms: median time of the whole pass.
        scan_ms: median time of all scans in it.
        share: median of the passes' own shares, 0 to 1.
    """

    forward_ms: float
    scan_ms: float
    share: float


def measure_scan_share(model: nn.Module, images: Tensor, *, repeats: int = 5, warmup: int = 2) -> ScanShare:
    """Profile forward passes on a CPU, each by itself; the model is left in eval mode.

    Args:
        model: any model.
        images: a batch.
        repeats: profiled passes.
        warmup: passes before them.
    """
    model.eval()
    passes = []
    with torch.inference_mode(), quiet_profiler():
        for _ in range(warmup):
            model(images)
        for _ in range(repeats):
            with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(_MARK):
                model(images)
            times = {event.key: event.cpu_time_total / 1000 for event in profiler.key_averages()}
            # An operator's time includes its wait for its own threads.
            scans = sum(
                times.get(f"lightspine::{operator}", 0.0) for operator in ("selective_scan", "cross_scan")
            )
            passes.append((times[_MARK], scans))
    return ScanShare(
        forward_ms=statistics.median(total for total, _ in passes),
        scan_ms=statistics.median(scans for _, scans in passes),
        share=statistics.median(scans / total for total, scans in passes),
    )


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keep PyTorch's profiler from writing to the standard error, as it does when it starts."""
    # It reads this before its first use.
    level = os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if level == "99":
            del os.environ["KINETO_LOG_LEVEL"]
