"""From a row to something that can be called and timed."""

import copy
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
from lightspine.benchmark.models.scan_backend import WithScanBackend
from lightspine.benchmark.models.settings import Job
from lightspine.benchmark.models.specs import OFFICIAL_PREFIX, build_model
from lightspine.benchmark.results import Row
from lightspine.export.check import open_session
from lightspine.export.onnx_file import export_onnx
from lightspine.optimize.folding import optimize

TRAINABLE_MODES = ("eager", "compile")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model that is ready to run.

    Attributes:
        forward: one pass over the batch, without gradients.
        train_step: one step of training, if it was asked for and the mode can train.
        held_bytes: what the weights of `forward` take already; 0 where `forward` still loads them.
        model: what `forward` runs; `None` for an exported file.
    """

    forward: Callable[[], object]
    train_step: "TrainingStep | None" = None
    held_bytes: int
    model: nn.Module | None = None


class TrainingStep:
    """Forward, cross-entropy, backward and a step of AdamW on one batch with made-up labels.

    Args:
        model: what is trained; it is put into training mode.
        run: computes the logits, such as the compiled model.
        images: (B, C, H, W).
        dtype: of the products, under autocast; the weights stay as they are.
    """

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Any], images: Tensor, dtype: torch.dtype):
        self.model, self._run, self._images, self._dtype = model.train(), run, images, dtype
        self._labels = torch.arange(len(images), device=images.device) % 10
        # As in training: one pass over the weights on a CPU.
        on_cpu = images.device.type == "cpu"
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_cpu or None)

    def __call__(self) -> None:
        """Train on the batch once."""
        device = self._images.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            outputs = self._run(self._images)
        # A distilled model trains two heads.
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([F.cross_entropy(head.float(), self._labels) for head in heads]).sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def held_bytes(self) -> int:
        """What stays between two steps: the weights and, after the first, the optimiser's state."""
        states = [tensor for state in self._optimizer.state.values() for tensor in state.values()]
        return bytes_of(self.model) + sum(t.numel() * t.element_size() for t in states)


def why_impossible(row: Row) -> str | None:
    """Return why a combination of options does not exist, or `None` where it does."""
    if row.mode == "onnx" and row.dtype != "float32":
        return f"the exported files are measured in float32, not in {row.dtype}"
    if row.mode == "onnx" and row.device != "cpu":
        return f"the exported files are measured on a CPU, not on {row.device}"
    return None


def count_row_macs(job: Job) -> tuple[Macs, int]:
    """Return the multiply-adds of one image and the number of parameters, of the eager model."""
    with torch.device("meta"):
        model = build_model(job.spec, job.row.height, job.row.width)
    macs = count_macs(model, (3, job.row.height, job.row.width))
    return macs, sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def onnx_files() -> Iterator[Callable[[Job], Path]]:
    """Give a function that returns the exported file of a row, written when it is first asked for."""
    with tempfile.TemporaryDirectory() as folder:
        written: dict[tuple[object, ...], Path] = {}

        def file_of(job: Job) -> Path:
            row = job.row
            key = (row.model, row.source, row.variant, row.height, row.width)
            if key not in written:
                path = Path(folder) / f"{len(written)}.onnx"
                model = _built(job)
                # timm's models do not promise to be exported for every size at once.
                size = None if row.source == "lightspine" else (row.height, row.width)
                export_onnx(model, path, fixed_size=size, shapes=[(1, row.height, row.width)])
                written[key] = path
            return written[key]

        yield file_of


def prepare(job: Job, onnx_file: Path | None, *, train: bool) -> Prepared:
    """Build the model of a row and put it into its mode.

    In a reduced precision the forward pass runs a model that was cast as a whole; the training step keeps
    float32 weights and computes under autocast, as trainings do.

    Args:
        job: the row.
        onnx_file: the exported file, for the mode "onnx".
        train: prepare a training step too.
    """
    row = job.row
    images = torch.randn(row.batch, 3, row.height, row.width, generator=torch.Generator().manual_seed(0))
    if onnx_file is not None:
        return Prepared(forward=_onnx_pass(onnx_file, row, images), held_bytes=0)
    device, dtype = torch.device(row.device), getattr(torch, row.dtype)
    model = _built(job)
    step = None
    if train and row.mode in TRAINABLE_MODES:
        trained = copy.deepcopy(model).to(device)
        step = TrainingStep(trained, _compiled(trained, row), images.to(device), dtype)
    if row.mode == "optimized":
        model, images = _optimized(model, row, images)
    model = model.to(device, dtype)
    return Prepared(
        forward=partial(_forward, _compiled(model, row), images.to(device, dtype)),
        train_step=step,
        held_bytes=bytes_of(model),
        model=model,
    )


def bytes_of(model: nn.Module) -> int:
    """Return what the parameters and buffers of a model take."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _built(job: Job) -> nn.Module:
    model = build_model(job.spec, job.row.height, job.row.width)
    return model if job.spec.scan_backend is None else WithScanBackend(model, job.spec.scan_backend).eval()


def _optimized(model: nn.Module, row: Row, images: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a model as its library offers it for inference, and the images in the layout that it likes."""
    if row.source == "lightspine" and not row.model.startswith(OFFICIAL_PREFIX):
        return optimize(model), images
    fused = timm.utils.reparameterize_model(model)
    layout: Any = {"memory_format": torch.channels_last}
    return fused.to(**layout), images.contiguous(**layout)


def _compiled(model: nn.Module, row: Row) -> Callable[[Tensor], Any]:
    return torch.compile(model, dynamic=False) if row.mode == "compile" else model


def _forward(model: Callable[[Tensor], Any], images: Tensor) -> object:
    with torch.inference_mode():
        return model(images)


def _onnx_pass(path: Path, row: Row, images: Tensor) -> Callable[[], object]:
    sessions: list[Any] = []

    def run() -> object:
        # Opened in the first call, so that the memory of a session counts to the pass.
        if not sessions:
            sessions.append(open_session(path, row.threads))
        session = sessions[0]
        return session.run(None, {session.get_inputs()[0].name: images.numpy()})

    return run
