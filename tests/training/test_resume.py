"""A run that is stopped and resumed equals an uninterrupted one."""

import csv
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.errors import LightspineError, UsageError
from lightspine.training.checkpoint import LastCheckpoint
from lightspine.training.resume import (
    TrainingInterruptedError,
    check_optimizer_state,
    find_checkpoint,
    prepare_folder,
)
from lightspine.utils import folder_lock
from lightspine.utils.folder_lock import lock_folder
from support.interruption import KillAtStep
from support.processes import kill_at, train_command
from support.training import make_task, run, same_weights

MEASURED = ("seconds", "data_share", "peak_mib")


def _log(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without times and memory."""
    with (folder / "metrics.csv").open() as file:
        return [
            {key: value for key, value in row.items() if key not in MEASURED} for row in csv.DictReader(file)
        ]


def _stop(folder: Path, step: int, **options: Any) -> None:
    with pytest.raises(TrainingInterruptedError):
        run(folder, callbacks=[KillAtStep(step, signal.SIGINT)], **options)
    # A random state different from that of the interrupted run.
    torch.manual_seed(99)


@pytest.mark.parametrize(("step", "ema_decay"), [(3, 0.9), (6, None), (9, 0.9), (11, None)])
def test_run_stopped_within_an_epoch_ends_like_an_uninterrupted_one(
    tmp_path: Path, step: int, ema_decay: float | None
) -> None:
    def options() -> dict[str, Any]:
        return {"task": make_task(mixup=0.2, ema_decay=ema_decay), "save_every_steps": 2}

    whole = run(tmp_path / "whole", **options())
    _stop(tmp_path / "parts", step, **options())
    parts = run(tmp_path / "parts", resume="auto", **options())
    assert same_weights(parts.weights, whole.weights)
    assert _log(parts.folder) == _log(whole.folder)


def test_accumulated_steps_are_resumed_exactly(tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {"task": make_task(), "save_every_steps": 1, "effective_batch": 64, "epochs": 2}

    whole = run(tmp_path / "whole", **options())
    _stop(tmp_path / "parts", 5, **options())
    parts = run(tmp_path / "parts", resume="auto", **options())
    assert same_weights(parts.weights, whole.weights)
    assert _log(parts.folder) == _log(whole.folder)


def test_finished_run_is_only_exported_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first = run(tmp_path / "run", task=make_task(ema_decay=0.9))
    kept = first.weights.rename(tmp_path / "kept.safetensors")
    again = run(tmp_path / "run", task=make_task(ema_decay=0.9), resume="auto")
    assert same_weights(again.weights, kept)
    assert "epochs: only its files are written again" in caplog.text


def test_auto_begins_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    result = run(tmp_path / "run", epochs=1, resume="auto")
    assert result.folder == tmp_path / "run"


def test_auto_takes_the_folder_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert prepare_folder(tmp_path, resume="auto") == tmp_path


def test_taken_folder_gets_a_numbered_neighbour(tmp_path: Path) -> None:
    for expected in ("run", "run-2", "run-3"):
        folder = prepare_folder(tmp_path / "run")
        assert folder == tmp_path / expected
        (folder / "file").touch()


def test_resuming_from_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.ckpt is not a file"):
        find_checkpoint(tmp_path, tmp_path / "gone.ckpt", 5)


def test_resuming_a_finished_run_by_its_file_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "run", epochs=1)
    with pytest.raises(UsageError, match="already trained for 1 of 1 epochs"):
        run(tmp_path / "run", epochs=1, resume=done.last_checkpoint)


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_resuming_from_a_damaged_checkpoint_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(LightspineError, match=r"cannot resume from .*last\.ckpt"):
        run(tmp_path / "run", resume=tmp_path / "last.ckpt")


def test_saving_less_often_than_every_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every 1 step or more, got 0"):
        LastCheckpoint(tmp_path, every_n_steps=0)


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_weights_and_log(tmp_path: Path) -> None:
    mixed = ["--model.mixup=0.2", "--model.ema_decay=0.9", "--model.model_args={drop_path_rate: 0.1}"]
    weights = run(tmp_path / "teacher", epochs=1).weights
    teacher = f"--model.teacher={{teacher: test_resnet, checkpoint: {weights}, heads: one, kind: soft}}"
    flags = ["--model.model=test_efficientnet", "--data.batch_size=32", *mixed, teacher]
    flags.append("--save-every-steps=3")
    whole = train_command(tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    # Interrupt twice, at arbitrary steps, once in each epoch.
    steps = random.SystemRandom()
    for step in (steps.randint(1, 7), steps.randint(8, 15)):
        killed = train_command(tmp_path / "parts", *flags, "--resume", *kill_at(step))
        assert killed.returncode == -signal.SIGKILL, (step, killed.stderr)
    resumed = train_command(tmp_path / "parts", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(*(tmp_path / name / "model.safetensors" for name in ("whole", "parts")))
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")


def test_run_in_the_folder_of_a_run_that_goes_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.1)
    folder = tmp_path / "run"
    _stop(folder, 8)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with lock_folder(folder), pytest.raises(LightspineError, match=f"another process is writing to {folder}"):
        run(folder, resume="auto")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert run(folder, resume="auto").folder == folder


def test_folder_with_only_a_lock_file_counts_as_empty(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        pass
    assert prepare_folder(tmp_path) == tmp_path


def test_optimizer_state_of_another_shape_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}
    with pytest.raises(LightspineError, match=r"has exp_avg of shape \(2,\) .* of shape \(4, 3\)"):
        check_optimizer_state(optimizer)


def test_optimizer_state_without_memory_of_its_own_is_copied() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1).expand(4, 3)}
    check_optimizer_state(optimizer)
    assert optimizer.state[weight]["exp_avg"].untyped_storage().nbytes() == 48
