"""Training on every device and in every precision: the losses are near those of float32 on a CPU.

The same tests run on a CPU in the normal suite, and on a CUDA device with `pytest -m gpu`.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightspine.data.modules import DigitsDataModule
from lightspine.dense import create_detector, create_segmenter
from lightspine.training.callbacks import DataTimer
from lightspine.training.fit import train
from lightspine.training.nonfinite import NonFiniteGuard
from support.dense import MEMBERS, NUM_CLASSES, few_proposals, scene
from support.training import make_task

FAMILIES = ("vmamba", "vim", "efficientvim", "shvit", "efficientmod")
STEPS = 2
CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


def _cuda(*values: Any) -> Any:
    return pytest.param(*values, marks=CUDA)


class Losses(pl.Callback):
    """Records the loss of every step without reading it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def on_train_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
        self.tensors.append(outputs["loss"])

    def values(self) -> list[float]:
        return [float(loss) for loss in self.tensors]


def _classifier_losses(
    family: str, folder: Path, *, accelerator: str, precision: str, recompute: bool, channels_last: bool
) -> list[float]:
    name, sizes = MEMBERS[family]
    task = make_task(model=name, model_args=sizes, lr=1e-3, ema_decay=0.9)
    if channels_last:
        task.model.to(memory_format=torch.channels_last)
    losses = Losses()
    train(
        task,
        DigitsDataModule(batch_size=8, image_size=64),
        folder=folder,
        epochs=1,
        accelerator=accelerator,
        devices=1,
        precision=precision,
        grad_checkpointing=recompute,
        gradient_clip=1.0,
        progress=False,
        callbacks=[losses],
        limit_train_batches=STEPS,
        limit_val_batches=1,
    )
    assert task.guard.skipped == 0
    return losses.values()


@cache
def _expected_losses(family: str, folder: Path) -> list[float]:
    return _classifier_losses(
        family, folder, accelerator="cpu", precision="32-true", recompute=False, channels_last=False
    )


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.mark.parametrize(
    ("family", "accelerator", "precision", "recompute", "channels_last"),
    [
        ("shvit", "cpu", "bf16-mixed", True, True),
        *(
            pytest.param(family, "cpu", "bf16-mixed", True, True, marks=pytest.mark.slow)
            for family in FAMILIES
            if family != "shvit"
        ),
        *(
            _cuda(family, "gpu", precision, recompute, channels_last)
            for family in FAMILIES
            for precision, recompute, channels_last in (
                ("bf16-mixed", False, False),
                ("bf16-mixed", True, True),
                ("16-mixed", False, True),
            )
        ),
    ],
)
def test_losses_of_a_classifier_are_near_those_in_float32(
    family: str,
    accelerator: str,
    precision: str,
    recompute: bool,
    channels_last: bool,
    tmp_path: Path,
    reference_folder: Path,
) -> None:
    expected = _expected_losses(family, reference_folder / family)
    found = _classifier_losses(
        family,
        tmp_path / "run",
        accelerator=accelerator,
        precision=precision,
        recompute=recompute,
        channels_last=channels_last,
    )
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=0.03)


def _network(head: str, family: str) -> tuple[nn.Module, Sequence[Any]]:
    """Return a small network and the arguments of a training step."""
    name, sizes = MEMBERS[family]
    arguments = {"model_args": sizes, "channels": 16}
    torch.manual_seed(0)
    if head in ("retinanet", "mask_rcnn"):
        network = few_proposals(create_detector(head, name, NUM_CLASSES, **arguments))
        return network, scene()
    network = create_segmenter(head, name, NUM_CLASSES, dropout=0.0, **arguments)
    return network, (torch.rand(2, 3, 64, 64), torch.randint(0, NUM_CLASSES, (2, 64, 64)))


def _dense_losses(head: str, family: str, device: str, dtype: torch.dtype) -> list[float]:
    """Return the losses of two steps as the trainer takes them: autocast, scaled in float16."""
    network, batch = _network(head, family)
    network.train().to(device)
    inputs = _move(batch, device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16, init_scale=1024.0)
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            loss = torch.stack(list(network(*inputs).values())).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())
    return losses


def _move(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _move(part, device) for name, part in value.items()}
    return [_move(part, device) for part in value]


@pytest.mark.parametrize(
    ("family", "device", "dtype"),
    [
        pytest.param("shvit", "cpu", torch.bfloat16, marks=pytest.mark.slow),
        *(_cuda(family, "cuda", dtype) for family in FAMILIES for dtype in (torch.bfloat16, torch.float16)),
    ],
)
# Two-stage detectors draw their proposals at random, on the device.
@pytest.mark.parametrize(
    ("head", "tolerance"),
    [("retinanet", 0.05), ("mask_rcnn", 0.5), ("semantic_fpn", 0.05), ("upernet", 0.05)],
)
def test_losses_of_a_dense_network_are_near_those_in_float32(
    head: str, tolerance: float, family: str, device: str, dtype: torch.dtype
) -> None:
    expected = _dense_losses(head, family, "cpu", torch.float32)
    assert _dense_losses(head, family, device, dtype) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("device", ["cpu", _cuda("cuda")])
def test_bad_step_is_skipped_on_the_device(device: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    guard = NonFiniteGuard(deferred=True)
    guard.start(net, read_every=10)
    before: list[Tensor] = []
    for scale in (1.0, float("nan"), 1.0):
        if scale != scale:
            before = [value.clone() for value in net.state_dict().values()]
        loss = net(torch.ones(3, 4, device=device)).sum() * scale
        optimizer.zero_grad()
        loss.backward()
        guard.check_loss(loss, net, torch.ones(3, 4, device=device))
        guard.check_step(net, optimizer)
        optimizer.step()
        if scale != scale:
            assert all(map(torch.equal, before, net.state_dict().values()))
    guard.read()
    assert guard.skipped == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_at_work_does_not_wait_for_data() -> None:
    timer = DataTimer(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(4):
        timer.batch_ready()
        for _ in range(20):
            matrix = matrix @ matrix * 1e-2
        # The host goes on at once, long before the products are computed.
        timer.step_done()
    assert timer.wait_share() < 0.05
