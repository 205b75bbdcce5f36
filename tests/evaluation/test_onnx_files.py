"""An exported file is scored and predicted with as the checkpoint it was made of."""

from pathlib import Path

import pytest

import lightspine
from lightspine.errors import UsageError
from lightspine.evaluation import evaluate, predict
from lightspine.export import export_onnx
from lightspine_cli.main import main
from support.checkpoints import save_small
from support.images import COLOURS, write_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, what was exported of it, and images."""
    folder = tmp_path_factory.mktemp("onnx")
    save_small(folder / "model.safetensors", classes=list(COLOURS))
    model, saved = lightspine.load_model(folder / "model.safetensors")
    export_onnx(
        model,
        folder / "model.onnx",
        shapes=[(1, 32, 32)],
        class_names=saved.class_names,
        preprocessing=saved.preprocessing,
    )
    write_folder(folder / "images", count=3)
    return folder


def test_scores_are_those_of_the_checkpoint(place: Path) -> None:
    exported, own = (evaluate(place / name, place / "images") for name in ("model.onnx", "model.safetensors"))
    assert exported["top1"] == own["top1"]
    assert exported["confusion"] == own["confusion"]
    assert exported["loss"] == pytest.approx(own["loss"], abs=1e-4)
    assert exported["parameters"] is None


def test_predictions_are_those_of_the_checkpoint(place: Path) -> None:
    images = sorted((place / "images").rglob("*.jpg"))
    exported, own = (predict(place / name, images) for name in ("model.onnx", "model.safetensors"))
    for ours, theirs in zip(exported, own, strict=True):
        assert [score.name for score in ours.classes] == [score.name for score in theirs.classes]
        assert ours.classes[0].probability == pytest.approx(theirs.classes[0].probability, abs=1e-5)


def test_choice_of_weights_is_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="expected no choice of weights for the exported file"):
        evaluate(place / "model.onnx", place / "images", weights="ema")


def test_commands_take_an_exported_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(next((place / "images").rglob("*.jpg")))
    assert main(["predict", "--checkpoint", str(place / "model.onnx"), image]) == 0
    assert main(["evaluate", "--checkpoint", str(place / "model.onnx"), "--data", str(place / "images")]) == 0
    assert "top-1" in capsys.readouterr().out
