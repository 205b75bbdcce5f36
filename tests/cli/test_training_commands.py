"""Commands that train, on the digits dataset."""

import json
from pathlib import Path

import pytest

from lightspine.compare.runs import runs_of_recipes
from lightspine.recipes import list_recipes
from lightspine_cli.main import main

FAMILIES = {"vmamba", "vim", "efficientvim", "shvit", "efficientmod"}
DIGITS_RECIPES = [name for name in list_recipes() if name.startswith("digits_")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "run"
    model = ["--model.init_args.model", "test_resnet"]
    assert (
        main(
            [
                "train",
                "--config",
                "digits_shvit_s1",
                *model,
                "--trainer.max_epochs",
                "1",
                "--folder",
                str(folder),
            ]
        )
        == 0
    )
    return folder


def test_train_leaves_a_model_that_evaluate_takes(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(trained / "model.safetensors"), "--data", "digits"]
    assert main(["evaluate", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["images"]) == ("test_resnet", 359)


def test_evaluate_writes_the_report_that_it_prints(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(trained / "model.safetensors"), "--data", "digits", "--out", str(out)]
    assert main(["evaluate", *arguments, "--json"]) == 0
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert written == json.loads(capsys.readouterr().out)


def test_evaluate_table_has_every_class(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--checkpoint", str(trained / "model.safetensors"), "--data", "digits"]) == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [word for word in first_words if word.isdigit()] == [str(digit) for digit in range(10)]


def test_predict_shows_as_many_classes_as_asked_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightspine.data.digits import export_digits

    [(image, _)] = export_digits(tmp_path, count=1)
    assert (
        main(["predict", str(image), "--checkpoint", str(trained / "model.safetensors"), "--topk", "3"]) == 0
    )
    assert capsys.readouterr().out.count(" %") == 3


def test_unreadable_image_is_named_in_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "broken.png"
    image.write_bytes(b"no image")
    assert main(["predict", str(image), "--checkpoint", str(trained / "model.safetensors")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "broken.png" in line


def test_compare_json_is_alone_on_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "digits", "--models", "test_resnet", "--epochs", "1", "--size", "32"]
    assert main(["compare", *arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in result["models"]] == ["done"]


def test_compare_with_a_model_that_diverges_has_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--data",
        "digits",
        "--models",
        "test_resnet",
        "--epochs",
        "1",
        "--size",
        "32",
        "--lr",
        "1e15",
    ]
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert "test_resnet failed: " in capsys.readouterr().out


def test_compare_tells_a_model_of_fixed_size_the_size(tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--models", "test_vit", "--epochs", "1", "--size", "48"]
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 0


def test_demo_has_one_recipe_per_family() -> None:
    names = [run.name for run in runs_of_recipes(DIGITS_RECIPES)]
    assert sorted(name.split("_")[0] for name in names) == sorted(FAMILIES)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_demo_reaches_97_percent_with_every_family(tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    result = json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))
    scores = {row["name"]: row["accuracy"] for row in result["models"]}
    assert {name: score for name, score in scores.items() if score < 97} == {}
    assert len(scores) == len(FAMILIES)
