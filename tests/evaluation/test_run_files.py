"""Every file of a run knows the same: all commands give the same scores and predictions with each of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightspine.dense import load_network
from lightspine.models.checkpoint import read_checkpoint
from lightspine_cli.main import main
from support.images import write_folder, write_image
from support.run_files import train_classifier, train_detector, train_segmenter, write_objects

WEIGHTS = "model.safetensors"
CHECKPOINTS = ("best.ckpt", "last.ckpt")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a task with the data `data`, the run `run` and an image `a.png`; trained at first use."""
    trained: dict[str, Path] = {}
    functions = {"classifier": train_classifier, "detector": train_detector, "segmenter": train_segmenter}

    def folder_of(task: str) -> Path:
        if task not in trained:
            trained[task] = tmp_path_factory.mktemp(task)
            functions[task](trained[task] / "data", trained[task] / "run")
            write_image(trained[task] / "a.png", (40, 60, 200), size=(64, 48), seed=9)
        return trained[task]

    return folder_of


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command and returns its JSON output."""

    def run(*arguments: Any) -> Any:
        # What an export printed.
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def _export(folder: Path, name: str) -> Path:
    """Return an export of the best checkpoint of a run."""
    file = folder / name
    if not file.is_file():
        # The coarse levels of a pyramid are traced for one size.
        flags = [] if file.suffix == ".onnx" else ["--to", "pt2", "--fixed-size", "64x96"]
        assert main(["export", str(folder / "run" / "best.ckpt"), str(file), *flags]) == 0
    return file


def _scores(report: dict[str, Any]) -> dict[str, Any]:
    names = ("images", "split", "top1", "loss", "confusion", "scores", "classes", "preprocessing", "settings")
    return {name: report[name] for name in names if name in report}


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("classifier", "best.ckpt"),
        pytest.param("classifier", "last.ckpt", marks=slow),
        ("detector", "best.ckpt"),
        pytest.param("detector", "last.ckpt", marks=slow),
        ("segmenter", "best.ckpt"),
        pytest.param("segmenter", "last.ckpt", marks=slow),
    ],
)
def test_checkpoint_scores_as_the_exported_weights(
    task: str, name: str, runs: Callable[[str], Path], call: Callable[..., Any]
) -> None:
    folder = runs(task)
    expected, found = (
        call("evaluate", folder / "run" / file, "--data", folder / "data") for file in (WEIGHTS, name)
    )
    assert _scores(found) == _scores(expected)
    # What training measured, too.
    recorded = read_checkpoint(folder / "run" / WEIGHTS).metadata
    score = {"classifier": "val_top1", "detector": "val_box_AP", "segmenter": "val_mIoU"}[task]
    own = {
        "classifier": lambda: expected["top1"],
        "detector": lambda: expected["scores"]["box"]["AP"],
        "segmenter": lambda: expected["scores"]["mIoU"],
    }[task]()
    assert f"{own:.2f}" == recorded[score]


@slow
@pytest.mark.parametrize("task", ["classifier", "segmenter"])
def test_onnx_file_scores_as_the_checkpoint(
    task: str, runs: Callable[[str], Path], call: Callable[..., Any]
) -> None:
    folder = runs(task)
    file = _export(folder, "model.onnx")
    call("info", file)
    expected, found = (
        _scores(call("evaluate", path, "--data", folder / "data"))
        for path in (folder / "run" / WEIGHTS, file)
    )
    assert found.pop("loss", 0) == pytest.approx(expected.pop("loss", 0), abs=1e-4)
    assert found == expected


@pytest.mark.parametrize("task", ["classifier", "detector", "segmenter"])
def test_checkpoint_predicts_as_the_exported_weights(
    task: str, runs: Callable[[str], Path], call: Callable[..., Any]
) -> None:
    folder = runs(task)
    flags = ["--score-threshold", "0"] if task == "detector" else []
    results = [
        call("predict", folder / "run" / name, folder / "a.png", *flags) for name in (WEIGHTS, *CHECKPOINTS)
    ]
    assert results[0] == results[1] == results[2]


@slow
@pytest.mark.parametrize("task", ["classifier", "segmenter"])
def test_onnx_file_predicts_as_the_checkpoint(
    task: str, runs: Callable[[str], Path], call: Callable[..., Any]
) -> None:
    folder = runs(task)
    file = _export(folder, "model.onnx")
    [expected], [found] = (
        call("predict", path, folder / "a.png") for path in (folder / "run" / WEIGHTS, file)
    )
    if task == "segmenter":
        assert found["shares"] == expected["shares"]
        return
    for ours, theirs in zip(found["classes"], expected["classes"], strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


@slow
@pytest.mark.parametrize("task", ["classifier", "detector", "segmenter"])
def test_pt2_file_holds_the_metadata_and_the_network(task: str, runs: Callable[[str], Path]) -> None:
    folder = runs(task)
    extra = {"lightspine.json": ""}
    program = torch.export.load(_export(folder, "model.pt2"), extra_files=extra).module()
    saved = json.loads(extra["lightspine.json"])
    known = read_checkpoint(folder / "run" / WEIGHTS).metadata
    shared = {"lightspine.run", "lightspine.kwargs", "lightspine.class_names", "lightspine.network"}
    shared &= known.keys()
    assert {key: saved[key] for key in shared} == {key: known[key] for key in shared}
    if task == "segmenter":
        network, _ = load_network(folder / "run" / "best.ckpt")
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(program(images), network(images), atol=1e-4, rtol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("name", [CHECKPOINTS[0], pytest.param(CHECKPOINTS[1], marks=slow)])
def test_checkpoint_embeds_as_the_exported_weights(
    name: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = runs("classifier")
    features = []
    for file in (WEIGHTS, name):
        out = tmp_path / file
        arguments = ["embed", str(folder / "run" / file), "--data", str(folder / "data"), "--out", str(out)]
        assert main(arguments) == 0
        features.append(np.load(out / "features" / "pooled-000000.npy"))
    assert np.array_equal(*features)


@slow
def test_checkpoint_is_analyzed_as_the_exported_weights(runs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = runs("classifier")
    arrays = []
    for file in (WEIGHTS, *CHECKPOINTS):
        out = tmp_path / file
        assert (
            main(["analyze", "cam", str(folder / "run" / file), str(folder / "a.png"), "--out", str(out)])
            == 0
        )
        arrays.append(dict(np.load(out / "a.npz")))
    assert all(np.array_equal(arrays[0][key], other[key]) for other in arrays[1:] for key in arrays[0])


@slow
@pytest.mark.parametrize("task", ["classifier", "detector", "segmenter"])
def test_info_tells_the_same_of_every_file(
    task: str, runs: Callable[[str], Path], call: Callable[..., Any]
) -> None:
    folder = runs(task)
    own, checkpoint = (call("info", folder / "run" / name) for name in (WEIGHTS, "best.ckpt"))
    names = ("saved_as", "arguments", "classes", "preprocessing", "held_out", "run")
    assert {name: own[name] for name in names} == {name: checkpoint[name] for name in names}
    if task != "detector":
        assert own["held_out"] == "0.4 of the images with seed 3"


@slow
@pytest.mark.timeout(1800)
def test_onnx_file_of_a_detector_scores_and_predicts_as_the_checkpoint(
    runs: Callable[[str], Path], call: Callable[..., Any]
) -> None:
    folder = runs("detector")
    file = _export(folder, "model.onnx")
    weights = folder / "run" / WEIGHTS
    expected, found = (call("evaluate", path, "--data", folder / "data") for path in (weights, file))
    assert found["scores"]["box"]["AP"] == pytest.approx(expected["scores"]["box"]["AP"], abs=0.1)
    arguments = [folder / "a.png", "--score-threshold", "0.05", "--out"]
    (expected,), (found,) = (
        call("predict", path, *arguments, folder / path.stem) for path in (weights, file)
    )
    assert len(found["objects"]) == len(expected["objects"])
    assert Path(found["picture"]).is_file()


@slow
def test_exported_pyramid_is_refused_with_the_reason(
    runs: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs("detector")
    file = str(folder / "pyramid.onnx")
    assert main(["export", str(folder / "run" / "best.ckpt"), file, "--features"]) == 0
    for arguments in (["predict", file, str(folder / "a.png")], ["evaluate", file, "--data", "x"]):
        capsys.readouterr()
        assert main(arguments) == 2
        assert "holds the backbone and feature pyramid of a detector" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "arguments", "sentence"),
    [
        ("classifier", ["a.png", "--out", "o"], "--out is for --data or for a detector or segmenter"),
        ("classifier", [], "expected image files, or --data with a folder or shards, got neither"),
        ("classifier", ["--data", "d"], "expected --out with a folder for the predictions of --data"),
        ("segmenter", ["--topk", "3"], "--topk is for a classifier, but"),
    ],
)
def test_wrong_use_of_a_checkpoint_is_told_by_its_task(
    task: str,
    arguments: list[str],
    sentence: str,
    runs: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", str(runs(task) / "run" / "last.ckpt"), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_segmentation_of_a_checkpoint_is_drawn(runs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = runs("segmenter")
    file, image = folder / "run" / "best.ckpt", folder / "a.png"
    assert main(["predict", str(file), str(image), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "a.png").is_file()


def test_other_images_than_those_of_the_training_are_all_evaluated(
    runs: Callable[[str], Path], tmp_path: Path, call: Callable[..., Any]
) -> None:
    run = runs("classifier") / "run" / WEIGHTS
    write_folder(tmp_path / "other", count=4, splits=("", "x"))
    assert call("evaluate", run, "--data", tmp_path / "other" / "x")["images"] == 12


def test_folder_with_a_new_image_is_evaluated_with_a_warning(
    tmp_path: Path, call: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    train_classifier(tmp_path / "data", tmp_path / "run")
    write_image(tmp_path / "data" / "red" / "new.jpg", (220, 40, 30), seed=77)
    report = call("evaluate", tmp_path / "run" / WEIGHTS, "--data", tmp_path / "data")
    assert report["split"] == "all images, training images included"
    assert "images that the model was trained on are among these" in caplog.text


def test_evaluation_on_the_training_split_says_so(
    runs: Callable[[str], Path], call: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = runs("detector")
    report = call("evaluate", folder / "run" / WEIGHTS, "--data", folder / "data", "--split", "train")
    assert report["split"] == "train: the training images"
    assert "these are the images that the model was trained on" in caplog.text


def test_detector_remembers_the_images_that_it_held_out(tmp_path: Path, call: Callable[..., Any]) -> None:
    train_detector(write_objects(tmp_path / "data", "train", count=10), tmp_path / "run")
    report = call("evaluate", tmp_path / "run" / "best.ckpt", "--data", tmp_path / "data")
    assert (report["images"], report["split"]) == (2, "0.2 held out by the training with seed 0")
