"""Distributed training (DDP): two ranks match one, and the run ends if a rank dies."""

import csv
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.processes import kill_at, train_command

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Layer norms only, so that half a batch is normalised like a whole one; plain steps along the gradient.
PLAIN = [
    "--model.model=test_vit",
    "--model.model_args={img_size: 32}",
    "--model.optimizer=sgd",
    "--model.lr=0.05",
]


def _train_losses(folder: Path) -> list[float]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own launcher", "torchrun"])
def test_two_processes_train_like_one_with_the_whole_batch(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    flags = [*PLAIN, "--data.augment=false"]
    one = train_command(tmp_path / "one", *flags, "--data.batch_size=32")
    two = train_command(tmp_path / "two", *flags, *TWO, "--data.batch_size=16", launcher=launcher)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert len(two.stdout.splitlines()) == len(one.stdout.splitlines()) == 2
    expected, actual = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert _train_losses(tmp_path / "two") == pytest.approx(_train_losses(tmp_path / "one"), rel=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("two")] == ["two"]


@pytest.mark.slow
def test_two_processes_train_without_warnings(tmp_path: Path) -> None:
    # PyTorch and Lightning warned about the strides of 1x1 convolutions and about losses of one rank only.
    small = "{stem_stride: 4, embed_dims: [16, 24, 32], depths: [1, 1, 1], partial_dims: [null, 8, 8]}"
    flags = ["--model.model=shvit_s1", f"--model.model_args={small}"]
    run = train_command(tmp_path / "run", *flags, *TWO)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    assert "recommended" not in run.stderr


@pytest.mark.slow
def test_synchronised_batch_norm_is_refused_on_a_cpu(tmp_path: Path) -> None:
    run = train_command(tmp_path / "run", *PLAIN, *TWO, "--trainer.sync_batchnorm=true")
    assert run.returncode == 2
    assert "lightspine: expected a GPU for sync_batchnorm, got the cpu" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own launcher", "torchrun"])
def test_death_of_one_process_ends_the_other(tmp_path: Path, rank: int, launcher: tuple[str, ...]) -> None:
    # Both runs together take less than a minute, including startup.
    dead = train_command(
        tmp_path / "run", *PLAIN, *TWO, *kill_at(3, rank=rank), launcher=launcher, timeout_s=60
    )
    assert dead.returncode not in (0, 2)
    assert f"rank {rank} of 2 ended before the others" in dead.stderr


@pytest.mark.slow
def test_death_ends_a_process_that_hangs(tmp_path: Path) -> None:
    hang = [
        "--trainer.callbacks+=support.interruption.HangAtStep",
        "--trainer.callbacks.step=3",
        "--trainer.callbacks.rank=1",
    ]
    dead = train_command(tmp_path / "run", *PLAIN, *TWO, *kill_at(3, rank=0), *hang, timeout_s=60)
    assert "rank 0 of 2 ended before the others" in dead.stderr


def _hang_at(step: int, *, rank: int, stopped: bool) -> list[str]:
    """Return the flags that stop a process, as Ctrl-Z does, or let its main thread wait forever."""
    kind = "KillAtStep" if stopped else "HangAtStep"
    flags = [f"--trainer.callbacks.number={signal.SIGSTOP}"] if stopped else []
    return [
        f"--trainer.callbacks+=support.interruption.{kind}",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.rank={rank}",
        *flags,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own launcher", "torchrun"])
def test_sigterm_to_one_process_ends_both_with_one_sentence(
    tmp_path: Path, rank: int, launcher: tuple[str, ...]
) -> None:
    stop = [*kill_at(3, rank=rank), f"--trainer.callbacks.number={signal.SIGTERM}"]
    flags = [*PLAIN, *TWO, *stop, "--save-every-steps=1"]
    ended = train_command(tmp_path / "run", *flags, launcher=launcher)
    said = [line for line in ended.stderr.splitlines() if line.startswith("lightspine:")]
    assert ended.returncode != 0
    assert len(said) == 1, ended.stderr
    assert "training was interrupted" in said[0]
    assert f"resume with --resume {tmp_path / 'run' / 'last.ckpt'}" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stopped", "message"),
    [(True, "has not answered for 5 seconds"), (False, "has not proceeded for 5 seconds")],
    ids=["stopped", "waiting"],
)
def test_process_that_hangs_is_named(tmp_path: Path, stopped: bool, message: str) -> None:
    flags = [*PLAIN, *TWO, *_hang_at(3, rank=1, stopped=stopped), "--rank-timeout=5"]
    ended = train_command(tmp_path / "run", *flags)
    assert ended.returncode != 0
    assert f"lightspine: rank 1 of 2 {message}" in ended.stderr


@pytest.mark.slow
def test_run_of_two_processes_is_resumed_after_a_death(tmp_path: Path) -> None:
    flags = [*PLAIN, *TWO, "--save-every-steps=2"]
    whole = train_command(tmp_path / "whole", *flags)
    dead = train_command(tmp_path / "parts", *flags, "--resume", *kill_at(5, rank=0))
    assert dead.returncode == -signal.SIGKILL
    resumed = train_command(tmp_path / "parts", *flags, "--resume")
    assert (whole.returncode, resumed.returncode) == (0, 0), whole.stderr + resumed.stderr
    expected, actual = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
