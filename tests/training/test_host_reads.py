"""Reads of the device in a training step: none until the guard is due, in any kind of training."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightspine.data.modules import DigitsDataModule
from lightspine.training.fit import train
from support.training import make_task

# Operators that give the host a value or a size that the device computed.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
METHODS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)
# Lightning converts every metric of the progress bar in every step: the learning rate alone, which is in the
# memory of the host.
LIGHTNING = ["_local_scalar_dense"]


class HostReads(TorchDispatchMode):
    """Records the operators that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = Calls(self.seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype is torch.bool]
        # Indexing with a mask gives a tensor whose size the device computes.
        if name in READS or (name == "index" and masks):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Records calls that are no operators: reads of whole tensors, and copies of numbers to the device."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METHODS or (func is torch.tensor and kwargs.get("device") is not None):
            self.seen.append(func.__name__)
        return func(*args, **kwargs)


class Watch(pl.Callback):
    """Records the reads from the second batch up to the fifth, in the steps and between them."""

    def __init__(self) -> None:
        self.reads = HostReads()

    def on_train_batch_start(self, *arguments: Any) -> None:
        if arguments[-1] == 1:
            self.reads.__enter__()
            self.reads.calls.__enter__()
        if arguments[-1] == 4:
            self.reads.calls.__exit__(None, None, None)
            self.reads.__exit__(None, None, None)


class Batches(DigitsDataModule):
    """Six batches of the digits that are made before the training."""

    def train_dataloader(self) -> Any:
        batches: Any = list(itertools.islice(super().train_dataloader(), 6))
        return DataLoader(batches, batch_size=None)


def _reads(folder: Path, *, deferred: bool = True, precision: str = "32-true", **options: Any) -> list[str]:
    watch = Watch()
    clip = None if "agc" in options else 1.0
    task = make_task(**options)
    task.guard.deferred = deferred
    limits = {"limit_val_batches": 1, "accelerator": "cpu", "progress": False}
    train(
        task,
        Batches(batch_size=4),
        folder=folder,
        epochs=1,
        callbacks=[watch],
        gradient_clip=clip,
        precision=precision,
        **limits,
    )
    return watch.reads.seen


@pytest.fixture
def teacher(tmp_path: Path) -> dict[str, Any]:
    weights = tmp_path / "teacher.pt"
    torch.save(make_task(seed=1).model.state_dict(), weights)
    return {"teacher": "test_resnet", "checkpoint": weights, "heads": "one", "kind": "soft"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"optimizer": "sgd", "layer_decay": 0.9}, marks=pytest.mark.slow),
        {"ema_decay": 0.9, "mesa": {"start": 0.0}, "mixup": 0.8, "cutmix": 1.0},
        pytest.param({"agc": 0.02, "precision": "bf16-mixed"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_step_reads_nothing_from_the_device(options: dict[str, Any], tmp_path: Path) -> None:
    assert _reads(tmp_path / "run", **options) == 3 * LIGHTNING


@pytest.mark.slow
def test_step_with_a_teacher_reads_nothing_from_the_device(teacher: dict[str, Any], tmp_path: Path) -> None:
    assert _reads(tmp_path / "run", teacher=teacher) == 3 * LIGHTNING


def test_step_on_a_cpu_is_checked_at_once(tmp_path: Path) -> None:
    assert _reads(tmp_path / "run", deferred=False) == 3 * ["tolist", *LIGHTNING]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: torch.tensor(1.0, device=x.device),
    ],
)
def test_reads_are_found(read: Callable[[Tensor], Any]) -> None:
    reads = HostReads()
    with reads, reads.calls:
        nn.Linear(2, 2)(torch.ones(1, 2)).backward(torch.ones(1, 2))
        read(torch.ones(3))
    assert len(reads.seen) == 1
