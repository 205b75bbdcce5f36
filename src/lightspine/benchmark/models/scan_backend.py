"""A VMamba whose scans are computed by a backend of choice, which its constructor does not offer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor

from lightspine.errors import LightspineError
from lightspine.models import vmamba
from lightspine.ops.cross_scan import cross_scan


class WithScanBackend(nn.Module):
    """Runs a VMamba with one backend; for measurements, where all others run on their device's own.

    Args:
        model: a VMamba.
        backend: of `lightspine.ops.dispatch.available_backends()`.
    """

    def __init__(self, model: nn.Module, backend: str):
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, images: Tensor) -> Tensor:
        """Map images to what the model gives.

        Raises:
            LightspineError: no scan came by, so that the model would be measured as something that it is not.
        """
        with _every_scan_by(self.backend) as scans:
            logits: Tensor = self.model(images)
        if not scans:
            raise LightspineError(f"no scan of {type(self.model).__name__} could be run by {self.backend!r}")
        return logits


@contextmanager
def _every_scan_by(backend: str) -> Iterator[list[None]]:
    scans: list[None] = []
    by_backend = partial(cross_scan, backend=backend)

    def scan(*args: Any, **kwargs: Any) -> Tensor:
        scans.append(None)
        return by_backend(*args, **kwargs)

    blocks: Any = vmamba
    usual, blocks.cross_scan = blocks.cross_scan, scan
    try:
        yield scans
    finally:
        blocks.cross_scan = usual
