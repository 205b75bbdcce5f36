"""Build the model of a benchmark row and return its forward pass and training step as callables."""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm.utils
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.benchmark.macs import Macs, count_macs
from lightspine.benchmark.model_specs import OFFICIAL_PREFIX, build_model
from lightspine.benchmark.results import EXPORTED_MODES, Row
from lightspine.benchmark.settings import Job
from lightspine.blocks import SS2D
from lightspine.errors import LightspineError
from lightspine.export.onnx_file import export_onnx
from lightspine.export.onnx_network import open_exported
from lightspine.export.verification import open_session
from lightspine.ops.cross_scan import cross_scan, unfused_projection
from lightspine.optimize import optimize

TRAINABLE_MODES = ("eager", "compile")


@dataclass(frozen=True, kw_only=True)
class PreparedRow:
    """A model that is ready to run.

    Attributes:
        forward: one forward pass over the batch, without gradients.
        train_step: one training step, if requested and supported by the mode.
        held_bytes: size of the weights of `forward`; 0 if `forward` loads them itself.
        model: the model of `forward`; `None` for an exported file.
    """

    forward: Callable[[], object]
    train_step: "TrainingStep | None" = None
    held_bytes: int
    model: nn.Module | None = None


class TrainingStep:
    """Forward pass, cross-entropy, backward pass and AdamW step on one batch with arbitrary labels.

    Args:
        model: the model, which is set to training mode.
        run: computes the logits, such as the compiled model.
        images: (B, C, H, W).
        dtype: dtype of autocast; the weights keep their own.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Any], images: Tensor, dtype: torch.dtype):
        self.model, self._run, self._images, self._dtype = model.train(), run, images, dtype
        self._labels = torch.arange(len(images), device=images.device) % 10
        # The library's trainer also uses the fused optimizer on a CPU.
        on_cpu = images.device.type == "cpu"
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_cpu or None)

    def __call__(self) -> None:
        """Run one training step."""
        device = self._images.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            outputs = self._run(self._images)
        # A model for distillation has two heads.
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([F.cross_entropy(head.float(), self._labels) for head in heads]).sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def held_bytes(self) -> int:
        """Size of the weights and, after the first step, of the optimizer state."""
        states = [tensor for state in self._optimizer.state.values() for tensor in state.values()]
        return weight_bytes(self.model) + sum(t.nbytes for t in states)


def unsupported_reason(row: Row) -> str | None:
    """Return why a combination of mode, dtype and device is not supported, or `None` if it is."""
    if row.mode in EXPORTED_MODES and row.dtype != "float32":
        return f"mode {row.mode} supports float32 only, got {row.dtype}"
    if row.mode in EXPORTED_MODES and row.device != "cpu":
        return f"mode {row.mode} runs on a CPU only, got {row.device}"
    return None


def count_row_macs(job: Job) -> tuple[Macs, int]:
    """Return the multiply-adds of one image and the number of parameters of the eager model."""
    with torch.device("meta"):
        model = build_model(job.spec, job.row.height, job.row.width)
    macs = count_macs(model, (3, job.row.height, job.row.width))
    return macs, sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def temporary_onnx_files() -> Iterator[Callable[[Job], Path]]:
    """Yield a function that exports the model of a row on its first call and returns the file.

    Models of lightspine are exported for any image size, models of timm for the size of the row.
    """
    with tempfile.TemporaryDirectory() as folder:
        written: dict[tuple[object, ...], Path] = {}

        def export(job: Job) -> Path:
            row = job.row
            key = (row.model, row.source, row.variant, row.height, row.width)
            if key not in written:
                path = Path(folder) / f"{len(written)}.onnx"
                model = _perturb_weights(_build_row_model(job))
                size = None if row.source == "lightspine" else (row.height, row.width)
                export_onnx(model, path, fixed_size=size, shapes=[(1, row.height, row.width)])
                written[key] = path
            return written[key]

        yield export


def prepare_row(job: Job, onnx_file: Path | None, *, train: bool) -> PreparedRow:
    """Build the model of a row in its mode, dtype and device.

    In half precision the forward pass runs a model whose weights were cast; the training step keeps float32
    weights and uses autocast.

    Args:
        job: the row.
        onnx_file: the exported file, for the modes "onnx" and "runtime".
        train: also prepare a training step.
    """
    row = job.row
    images = torch.randn(row.batch, 3, row.height, row.width, generator=torch.Generator().manual_seed(0))
    if onnx_file is not None:
        return PreparedRow(forward=_onnx_forward(onnx_file, row, images), held_bytes=0)
    device, dtype = torch.device(row.device), getattr(torch, row.dtype)
    # On the device first: `optimize` chooses its layers by the device of the weights.
    model = _build_row_model(job).to(device)
    step = None
    if train and row.mode in TRAINABLE_MODES:
        trained = copy.deepcopy(model)
        step = TrainingStep(trained, _compile_if_requested(trained, row), images.to(device), dtype)
    # Before `optimize`, as the documentation advises: it keeps the parameters of scans in float32.
    model = model.to(dtype)
    if row.mode == "optimized":
        model, images = _optimize_for_inference(model, row, images)
    return PreparedRow(
        forward=partial(_forward, _compile_if_requested(model, row), images.to(device, dtype)),
        train_step=step,
        held_bytes=weight_bytes(model),
        model=model,
    )


def weight_bytes(model: nn.Module) -> int:
    """Return the size of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _build_row_model(job: Job) -> nn.Module:
    model = build_model(job.spec, job.row.height, job.row.width)
    return model if job.spec.scan_backend is None else WithScanBackend(model, job.spec.scan_backend).eval()


def _perturb_weights(model: nn.Module) -> nn.Module:
    # Constant folding would remove the ones and zeros of freshly initialized norms from the exported graph.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def _optimize_for_inference(model: nn.Module, row: Row, images: Tensor) -> tuple[nn.Module, Tensor]:
    """Optimize the model with its own library; return it and the images in its memory layout."""
    if row.source == "lightspine" and not row.model.startswith(OFFICIAL_PREFIX):
        return optimize(model), images
    fused = timm.utils.reparameterize_model(model)
    layout: Any = {"memory_format": torch.channels_last}
    return fused.to(**layout), images.contiguous(**layout)


def _compile_if_requested(model: nn.Module, row: Row) -> Callable[[Tensor], Any]:
    return torch.compile(model, dynamic=False) if row.mode == "compile" else model


def _forward(model: Callable[[Tensor], Any], images: Tensor) -> object:
    with torch.inference_mode():
        return model(images)


def _onnx_forward(path: Path, row: Row, images: Tensor) -> Callable[[], object]:
    sessions: list[Any] = []

    def run() -> object:
        # The session is opened in the first call, so that the forward pass includes its memory.
        if not sessions:
            runtime = row.mode == "runtime"
            sessions.append(
                open_exported(path, row.threads).session if runtime else open_session(path, row.threads)
            )
        session = sessions[0]
        return session.run(None, {session.get_inputs()[0].name: images.numpy()})

    return run


class WithScanBackend(nn.Module):
    """VMamba that runs all scans with one backend instead of the default of the device.

    Args:
        model: a VMamba.
        backend: one of `lightspine.ops.dispatch.available_backends()`.
    """

    def __init__(self, model: nn.Module, backend: str):
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, images: Tensor) -> Tensor:
        """Run the model.

        Raises:
            LightspineError: the model has no such scans.
        """
        with _redirect_scans(self.backend) as calls:
            logits: Tensor = self.model(images)
        if not calls:
            raise LightspineError(
                f"expected scans to run with {self.backend!r}, {type(self.model).__name__} has none"
            )
        return logits


@contextmanager
def _redirect_scans(backend: str) -> Iterator[list[None]]:
    calls: list[None] = []

    def scan(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return cross_scan(*args, **kwargs | {"backend": backend})

    # SS2D has no argument for the backend, so `cross_scan` is patched in its module during the pass.
    module: Any = sys.modules[SS2D.__module__]
    original, module.cross_scan = module.cross_scan, scan
    try:
        with unfused_projection():
            yield calls
    finally:
        module.cross_scan = original
