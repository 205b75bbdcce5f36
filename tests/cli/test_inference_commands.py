"""`lightspine evaluate`, `predict` and `embed` from the command line."""

import json
from pathlib import Path

import pytest

from lightspine_cli.main import main
from support.checkpoints import save_small
from support.images import COLOURS, write_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and images."""
    folder = tmp_path_factory.mktemp("commands")
    save_small(folder / "model.safetensors", classes=list(COLOURS))
    write_folder(folder / "images", count=3)
    return folder


def _checkpoint(place: Path) -> list[str]:
    return ["--checkpoint", str(place / "model.safetensors")]


def _many(place: Path, out: Path) -> list[str]:
    return ["--data", str(place / "images"), "--out", str(out)]


def test_predict_of_a_folder_writes_and_counts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *_checkpoint(place), *_many(place, tmp_path / "out"), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["images"], outcome["bad"]) == (9, 0)
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 10


def test_embed_tells_where_the_features_are(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["embed", str(place / "model.safetensors"), *_many(place, tmp_path / "out")]
    assert main([*arguments, "--stage", "0", "--stage", "pooled"]) == 0
    assert str(tmp_path / "out" / "index.csv") in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "out" / "features").iterdir())
    assert files == ["pooled-000000.npy", "stage0-000000.npy"]


def test_resume_of_a_finished_run_says_what_it_did(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", *_checkpoint(place), *_many(place, tmp_path / "out"), "--resume", "--json"]
    assert [main(arguments), main(arguments)] == [0, 0]
    assert capsys.readouterr().out.count('"computed": 9') == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--checkpoint", "m"], "expected image files, or --data with a folder or shards"),
        (
            ["predict", "a.png", "--checkpoint", "m", "--data", "d", "--out", "o"],
            "expected either image files or --data, got both",
        ),
        (["predict", "--checkpoint", "m", "--data", "d"], "expected --out with a folder for the predictions"),
        (["embed", "m.safetensors", "--data", "d"], "expected --data with the images and --out"),
        (["embed", "gone.safetensors", "--data", "d", "--out", "o"], "gone.safetensors does not exist"),
        (["evaluate", "--checkpoint", "m", "--data", "d", "--out", "r.json"], "expected a folder for --out"),
    ],
)
def test_wrong_call_is_one_sentence_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_evaluate_writes_its_folder_and_its_command(place: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(place / "images"), "--weights", "raw", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *_checkpoint(place), *arguments]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json",
        "classes.csv",
        "confusion.png",
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["command"].startswith("lightspine evaluate --checkpoint ")
    assert report["command"].endswith(str(tmp_path / "out"))
