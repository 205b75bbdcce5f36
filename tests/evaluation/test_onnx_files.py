"""Evaluation and prediction with an exported ONNX file, as with its checkpoint."""

import json
from pathlib import Path

import onnx
import pytest

import lightspine
from lightspine.errors import UsageError
from lightspine.evaluation import InferenceOptions, evaluate, predict, predict_images
from lightspine.export import export_onnx
from lightspine_cli.main import main
from support.checkpoints import save_small
from support.images import COLOURS, write_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its exports and images."""
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
    with pytest.raises(UsageError, match="expected weights='auto' for the exported file"):
        evaluate(place / "model.onnx", place / "images", weights="ema")


def test_other_device_than_the_cpu_is_refused(place: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the exported file .*model\.onnx runs on the CPU in float32 only, got meta"
    ):
        predict(place / "model.onnx", [], device="meta")


def test_runs_over_a_folder_refuse_another_device_too(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs on the CPU in float32 only, got meta"):
        predict_images(
            place / "model.onnx", place / "images", tmp_path / "out", options=InferenceOptions(device="meta")
        )


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
@pytest.mark.parametrize("option", [[], ["--checkpoint"]], ids=["first", "named"])
def test_commands_take_a_file(
    name: str, option: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, file = str(next((place / "images").rglob("*.jpg"))), str(place / name)
    assert main(["predict", *option, file, image, "--json"]) == 0
    assert [found["image"] for found in json.loads(capsys.readouterr().out)] == [image]
    assert main(["evaluate", *option, file, "--data", str(place / "images"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9


def test_predict_takes_a_file_for_a_whole_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(place / "model.onnx"), "--data", str(place / "images"), "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9


def foreign_file(folder: Path) -> Path:
    """Write an ONNX file that lightspine did not export."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / "foreign.onnx")
    return folder / "foreign.onnx"


def damaged_file(place: Path, folder: Path) -> Path:
    """Write the first half of a file."""
    content = (place / "model.onnx").read_bytes()
    (folder / "half.onnx").write_bytes(content[: len(content) // 2])
    return folder / "half.onnx"


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("kind", "message", "status"),
    [
        ("foreign", "expected a file that `lightspine export` wrote", 2),
        ("damaged", "ONNX Runtime cannot run ", 1),
        ("absent", "gone.onnx does not exist", 2),
    ],
)
def test_file_that_cannot_be_used_is_one_sentence(
    command: str,
    kind: str,
    message: str,
    status: int,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"foreign": foreign_file(tmp_path), "damaged": damaged_file(place, tmp_path)}
    file = str(files.get(kind, tmp_path / "gone.onnx"))
    image = str(next((place / "images").rglob("*.jpg")))
    rest = [image] if command == "predict" else ["--data", str(place / "images")]
    assert main([command, file, *rest]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "a.png"], "expected a checkpoint: "),
        (
            ["predict", "m.onnx", "a.png", "--checkpoint", "n.onnx"],
            "expected one checkpoint, got m.onnx and ",
        ),
        (["evaluate", "--data", "digits"], "expected a checkpoint: "),
        (["evaluate", "m.onnx", "--checkpoint", "n.onnx", "--data", "digits"], "expected one checkpoint"),
        (
            ["evaluate", "images", "--checkpoint", "n.onnx", "--data", "digits"],
            "expected a checkpoint as the",
        ),
    ],
)
def test_wrong_number_of_checkpoints_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
