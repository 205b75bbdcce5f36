"""`compare` end to end on tiny images, and its error handling."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightspine
from lightspine.compare.compare import compare
from lightspine.compare.results import CompareResult
from lightspine.compare.runs import CompareData, CompareSettings, ModelRun, data_of_settings, runs_of_models
from lightspine.errors import LightspineError, UsageError
from lightspine.training.fit import TrainingInterruptedError, TrainResult
from lightspine_cli.main import main
from support.checkpoints import put_published_shvit

MODELS = ["efficientvim_m1", "test_resnet"]
SETTINGS = CompareSettings(epochs=1, batch_size=8, size=32, num_workers=0, accelerator="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folder of two classes that differ in brightness, without val; one image is damaged."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("bright", 200)):
        (root / name).mkdir()
        for number in range(15):
            pixels = np.clip(rng.normal(level, 20, (40, 40, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "dark" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    return compare(
        runs_of_models(MODELS, images, SETTINGS),
        tmp_path_factory.mktemp("runs") / "compare",
        data=data_of_settings(images, SETTINGS),
        latency_repeats=3,
        progress=False,
    )


def test_every_model_is_measured(finished: CompareResult) -> None:
    assert [row.name for row in finished.finished] == MODELS
    unknown = [
        (row.name, key)
        for row in finished.models
        for key in ("params", "macs", "accuracy", "train_seconds", "latency_ms", "latency_p90_ms")
        if getattr(row, key) is None
    ]
    assert unknown == []


def test_results_file_holds_what_is_returned(finished: CompareResult) -> None:
    written = json.loads((finished.folder / "results.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(finished.as_dict()))


def test_results_tell_the_system(finished: CompareResult) -> None:
    assert finished.system["versions"]["lightspine"] == lightspine.__version__


@pytest.mark.parametrize("name", ["accuracy_latency.png", "predictions.png"])
def test_pictures_are_written(finished: CompareResult, name: str) -> None:
    with Image.open(finished.folder / name) as image:
        image.load()
        assert image.format == "PNG"


def test_saved_model_predicts_with_its_class_names(
    finished: CompareResult, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = finished.folder / "efficientvim_m1.safetensors"
    assert main(["predict", str(images / "dark" / "0.png"), "--checkpoint", str(checkpoint), "--json"]) == 0
    [prediction] = json.loads(capsys.readouterr().out)
    assert sorted(score["name"] for score in prediction["classes"]) == ["bright", "dark"]


def test_accuracy_is_that_of_the_saved_model(
    finished: CompareResult, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = finished.folder / "test_resnet.safetensors"
    arguments = ["--checkpoint", str(checkpoint), "--data", str(images), "--val-fraction", "0.2", "--json"]
    assert main(["evaluate", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["top1"] == next(row.accuracy for row in finished.models if row.name == "test_resnet")


def test_no_resume_checkpoint_stays_after_the_end(finished: CompareResult) -> None:
    assert list(finished.folder.rglob("*.ckpt")) == []


def test_second_comparison_leaves_the_first_alone(
    finished: CompareResult, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished.folder / "results.json").read_bytes()
    arguments = ["--data", str(images), "--models", "test_resnet", "--epochs", "1", "--size", "32"]
    assert main(["compare", *arguments, "--workers", "0", "--out", str(finished.folder)]) == 0
    assert "test_resnet.safetensors" in capsys.readouterr().out
    assert (finished.folder / "results.json").read_bytes() == before
    assert (finished.folder.with_name("compare-2") / "test_resnet.safetensors").is_file()


def test_comparison_starts_from_published_weights(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = put_published_shvit(tmp_path, monkeypatch)
    settings = replace(SETTINGS, lr=1e-12, epochs=1)
    [run] = runs_of_models(["shvit_s1.in1k"], images, settings)
    trained = run.train(tmp_path / "run", False)
    weight = lightspine.load_model(trained.weights)[0].state_dict()["stem.0.conv.weight"]
    torch.testing.assert_close(weight, tensors["patch_embed.0.c.weight"])


def test_published_weights_of_an_unknown_tag_are_refused(images: Path) -> None:
    with pytest.raises(UsageError, match="shvit_s1 has no weights with the tag 'in2k': expected in1k"):
        runs_of_models(["shvit_s1.in2k"], images, SETTINGS)


def _run(name: str, action: Callable[[], None]) -> ModelRun:
    def train(folder: Path, progress: bool) -> TrainResult:  # noqa: ARG001  the type of ModelRun.train
        action()
        raise AssertionError("the action must raise")

    return ModelRun(name=name, train=train)


def _raise(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def _compare_after(error: BaseException, images: Path, folder: Path) -> CompareResult:
    [good] = runs_of_models(["test_resnet"], images, SETTINGS)
    return compare(
        [_run("unlucky", _raise(error)), good],
        folder,
        data=data_of_settings(images, SETTINGS),
        latency_repeats=1,
        progress=False,
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LightspineError("the loss became nan"), "the loss became nan"),
        (RuntimeError("a\nb"), "RuntimeError: a b"),
    ],
    ids=["ours", "unexpected"],
)
def test_failure_of_one_model_leaves_the_others(
    error: Exception, sentence: str, images: Path, tmp_path: Path
) -> None:
    result = _compare_after(error, images, tmp_path)
    assert [(row.status, row.error) for row in result.models] == [("failed", sentence), ("done", "")]
    assert result.exit_status == 1


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), TrainingInterruptedError("stopped")], ids=["plain", "ours"]
)
def test_ctrl_c_keeps_what_was_finished(error: BaseException, images: Path, tmp_path: Path) -> None:
    [good] = runs_of_models(["test_resnet"], images, SETTINGS)
    result = compare(
        [good, _run("stopped", _raise(error)), _run("never", _raise(AssertionError("must not be started")))],
        tmp_path / "runs",
        data=data_of_settings(images, SETTINGS),
        latency_repeats=1,
        progress=False,
    )
    assert [row.status for row in result.models] == ["done", "interrupted", "waiting"]
    assert (result.folder / "accuracy_latency.png").is_file()
    assert result.exit_status == 130


def test_failed_models_alone_still_give_results(tmp_path: Path) -> None:
    digits = CompareData(source="digits", val_fraction=None, seed=0, size=32)
    result = compare([_run("unlucky", _raise(LightspineError("no")))], tmp_path, data=digits, progress=False)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["models"][0]["error"] == "no"
    assert result.exit_status == 1


def test_unknown_model_stops_before_any_training(images: Path) -> None:
    with pytest.raises(UsageError, match="unknown model 'test_resnett'; the closest names are"):
        runs_of_models(["efficientvim_m1", "test_resnett"], images, SETTINGS)


def test_held_out_images_are_not_trained_on(images: Path) -> None:
    from lightspine.data.image_folder import scan_image_folder

    data = data_of_settings(images, SETTINGS)
    chosen = {image.path for image in data.held_out_images(images, count=6)}
    trained = {sample.path for sample in scan_image_folder(images, val_fraction=0.2, seed=0).train}
    assert len(chosen) > 0
    assert not chosen & trained
