"""Checkpoint files: atomic writes, full disks, and no code in the file."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightspine.errors import LightspineError, UsageError
from lightspine.training.checkpoint import (
    AtomicCheckpointIO,
    BestCheckpoint,
    forget_foreign_files,
    load_training_state,
)
from support.training import make_task, run

KILLED_WHILE_WRITING = """
import os, sys, torch
from lightspine.training.checkpoint import AtomicCheckpointIO

class Fatal:
    def __reduce__(self):
        os.kill(os.getpid(), 9)

io = AtomicCheckpointIO()
io.save_checkpoint({"epoch": 1}, sys.argv[1])
io.save_checkpoint({"epoch": 2, "weights": torch.rand(1000), "fatal": Fatal()}, sys.argv[1])
"""


class FullDisk(pl.Callback):
    """Limits the size of files to 100 kB from an epoch on."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("limits")
def test_full_disk_is_a_sentence_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    message = r"cannot write the checkpoint .*\.ckpt: .*; the previous one is kept; the last checkpoint is"
    with pytest.raises(LightspineError, match=message) as caught:
        run(tmp_path / "run", epochs=3, callbacks=[FullDisk(1)], save_every_steps=2)
    assert caught.value.exit_status == 1
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not list((tmp_path / "run").glob("*.part"))


def test_file_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LightspineError, match=r"cannot write the checkpoint .*last\.ckpt: \w"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


def test_kill_during_writing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert AtomicCheckpointIO().load_checkpoint(path) == {"epoch": 1}
    # Files left behind by the kill do not affect the next write.
    AtomicCheckpointIO().save_checkpoint({"epoch": 3}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"epoch": Harmful()}, tmp_path / "last.ckpt")
    with pytest.raises(LightspineError, match=r"cannot resume from .*last\.ckpt"):
        run(tmp_path / "run", resume=tmp_path / "last.ckpt")
    assert not (tmp_path / "harm").exists()


def test_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no storage options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt", storage_options={"key": 1})


def test_checkpoint_has_the_entries_of_the_previous_release(tmp_path: Path) -> None:
    result = run(tmp_path / "run", task=make_task(ema_decay=0.9), epochs=1)
    stored = torch.load(result.last_checkpoint, weights_only=True)
    # Lightning finds a callback's state by class name; a renamed class would lose it silently.
    states = {key.partition("{")[0]: set(state) for key, state in stored["callbacks"].items()}
    assert states.pop("BestCheckpoint") >= {"best_model_score", "best_model_path"}
    assert states == {
        "RunLog": {"rows"},
        "EpochState": {"position", "sums"},
        "WeightAverage": {"latest_update_step"},
    }
    assert set(stored["guard"]) == {"skipped", "in_a_row"}
    assert {"state_dict", "current_model_state", "averaging_state", "optimizer_states"} <= set(stored)


def test_best_score_is_kept_in_a_moved_folder(tmp_path: Path) -> None:
    first = run(tmp_path / "first", epochs=1)
    states = torch.load(first.last_checkpoint, weights_only=True)["callbacks"]
    (state,) = (state for name, state in states.items() if name.startswith("BestCheckpoint"))
    moved = BestCheckpoint(tmp_path / "moved", "val_top1")
    moved.load_state_dict(state)
    assert float(moved.best_model_score) == pytest.approx(first.best_score)
    assert moved.best_model_path == moved.kth_best_model_path == str(tmp_path / "moved" / "best.ckpt")
    assert {path: float(score) for path, score in moved.best_k_models.items()} == {
        moved.best_model_path: pytest.approx(first.best_score)
    }


@pytest.mark.parametrize("callback", ["BestCheckpoint", "ModelCheckpoint"])
@pytest.mark.parametrize("address", ["local://{}", "{}", "run/../victim", "file://{}"])
def test_checkpoint_of_somebody_else_deletes_nothing(tmp_path: Path, callback: str, address: str) -> None:
    """Lightning deletes what the state of a checkpoint callback names as the worst checkpoint."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "photo.jpg").touch()
    first = run(tmp_path / "run", epochs=1)
    stored = torch.load(first.last_checkpoint, weights_only=True)
    (key,) = (name for name in stored["callbacks"] if name.startswith("BestCheckpoint"))
    path = address.format(victim) if "{}" in address else str(tmp_path / address)
    state = stored["callbacks"][key]
    state |= {"best_k_models": {path: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)}
    state |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), path)
    state.pop("dirpath", None)
    folder = tmp_path / "run"
    if callback == "ModelCheckpoint":
        stored["callbacks"] = {key.replace("BestCheckpoint", "ModelCheckpoint"): state}
        forget_foreign_files(stored["callbacks"], folder)
        (state,) = stored["callbacks"].values()
        assert state["best_k_models"] == {}
        assert state["kth_best_model_path"] == state["last_model_path"] == ""
        return
    torch.save(stored, first.last_checkpoint)
    run(folder, epochs=2, resume=first.last_checkpoint)
    assert (victim / "photo.jpg").exists()


def test_checkpoint_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "last.ckpt.part").symlink_to(tmp_path / "victim")
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(1)}, tmp_path / "last.ckpt")
    assert (tmp_path / "victim").read_text() == "keep"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["a"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": {"fit_loop": {"epoch_progress": "many"}}}, "numbers of epochs and batches are damaged"),
        ({"state_dict": {"weight": 7}}, "its weights or the states of its callbacks are damaged"),
        ({"callbacks": 7}, "its weights or the states of its callbacks are damaged"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_training_state_of_wrong_types_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    usual = {"state_dict": {}, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(usual | changes, tmp_path / "last.ckpt")
    with pytest.raises(LightspineError, match=message):
        load_training_state(tmp_path / "last.ckpt")
