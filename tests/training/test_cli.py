"""`lightspine train`: recipes, overriding flags and invalid flags."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from lightspine.errors import UsageError
from lightspine.models.factory import load_model
from lightspine.recipes import find_recipe, list_recipes
from lightspine.training.cli import TrainCLI, main, train_recipe
from lightspine.training.log_filters import filter_lightning_logs
from support.images import write_folder
from support.training import SMALL_MODEL, same_weights

QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--model.model={SMALL_MODEL}"]
ONE_BATCH = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]

# Recipes whose data needs no download; tests/recipes covers the published ones.
LAPTOP_RECIPES = [name for name in list_recipes() if "/" not in name]


def test_image_folder_is_trained_from_flags_alone(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=10)
    flags = [
        "--data=ImageFolderDataModule",
        f"--data.root={root}",
        "--data.image_size=32",
        "--data.batch_size=8",
    ]
    run = ["--data.num_workers=0", "--data.augmentation=light", "--model.lr=5e-3", "--trainer.max_epochs=8"]
    result = main([*QUICK, *flags, *run, "--folder", str(tmp_path / "run")])
    assert result.score >= 90
    assert load_model(result.weights)[1].class_names == ["blue", "green", "red"]


def test_recipe_with_overrides_is_trained_and_recorded(tmp_path: Path) -> None:
    result = train_recipe(
        "digits_shvit_s1",
        folder=tmp_path / "run",
        progress=False,
        overrides=[*ONE_BATCH, "--model.lr=1e-4", "--data.batch_size=8"],
    )
    record = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert record["model"]["init_args"]["lr"] == 1e-4
    assert record["data"]["init_args"]["batch_size"] == 8
    assert result.model == "shvit_s1"


def test_recorded_config_trains_the_same_run(tmp_path: Path) -> None:
    flags = [*QUICK, *ONE_BATCH, "--data=DigitsDataModule", "--seed=5"]
    first = main([*flags, "--folder", str(tmp_path / "a")])
    again = main(["--config", str(first.folder / "config.yaml"), "--folder", str(tmp_path / "b")])
    assert same_weights(first.weights, again.weights)


# Fine-tuning needs a checkpoint from the user, detectors and segmenters other data.
@pytest.mark.parametrize(
    "name", [name for name in LAPTOP_RECIPES if name.startswith(("digits_", "cifar10_", "image_folder"))]
)
def test_shipped_recipe_is_complete(name: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=2)
    # Without the workers of a recipe for a larger machine, of which PyTorch would warn.
    data = [] if name.startswith("digits_") else [f"--data.root={root}", "--data.num_workers=0"]
    with filter_lightning_logs():
        cli = TrainCLI(["--config", str(find_recipe(name)), "--folder", str(tmp_path / "run"), *data])
    assert cli.model.top1.num_classes == cli.datamodule.num_classes
    images, labels, _ = next(iter(cli.datamodule.val_dataloader()))
    assert len(images) == len(labels)


@pytest.mark.parametrize("name", LAPTOP_RECIPES)
def test_shipped_recipe_says_what_it_costs_and_how_it_is_run(name: str) -> None:
    head = [line for line in find_recipe(name).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert f"lightspine train --config {name}" in text
    for word in ("Hardware:", "Time:", "Score:"):
        assert word in text


def test_data_takes_the_preprocessing_of_the_model(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=2)
    flags = ["--data=ImageFolderDataModule", f"--data.root={root}", "--model.model=vit_tiny_patch16_224"]
    with filter_lightning_logs():
        cli = TrainCLI([*flags, "--folder", str(tmp_path / "run")])
    assert cli.datamodule.preprocessing.mean == (0.5, 0.5, 0.5)


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(UsageError, match="got 'digits_vimm': did you mean 'digits_vim_tiny'"):
        main(["--config", "digits_vimm"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.learning_rate=1", "learning_rate"),
        ("--model.optimizer=adamm", "adamm"),
        ("--model.lr=fast", "fast"),
        ("--nonsense=1", "nonsense"),
        ("--data=NoSuchData", r"DigitsDataModule, .* or the import path of a class, got 'NoSuchData'"),
        ("--effective-batch=many", "effective_batch"),
        ("--trainer.devices=abc", "invalid --trainer option: `devices`"),
        ("--trainer.strategy=fsdp", "invalid --trainer option: .*fsdp.*GPU"),
        ("--trainer.strategy=ddddp", "invalid --trainer option: .*ddddp"),
    ],
)
def test_wrong_flag_is_named_in_one_line(flag: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        main(["--config", "digits_shvit_s1", "--folder", str(tmp_path / "run"), flag])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_resume_without_a_value_goes_on_in_the_folder(tmp_path: Path) -> None:
    flags = [*QUICK, *ONE_BATCH, "--data=DigitsDataModule", "--folder", str(tmp_path / "run"), "--resume"]
    first = main(flags)
    assert [row["epoch"] for row in first.history] == [0]
    longer = main([*flags, "--trainer.max_epochs=2"])
    assert longer.folder == first.folder
    assert [row["epoch"] for row in longer.history] == [0, 1]


@pytest.mark.parametrize("flag", ["--effective-batch=16", "--effective_batch=16"])
def test_effective_batch_accumulates(flag: str, tmp_path: Path) -> None:
    flags = [*QUICK, "--data=DigitsDataModule", "--data.batch_size=4", flag, "--trainer.max_epochs=1"]
    limits = ["--trainer.limit_train_batches=8", "--trainer.limit_val_batches=1"]
    result = main([*flags, *limits, "--folder", str(tmp_path / "run")])
    assert torch.load(result.last_checkpoint, weights_only=True)["global_step"] == 2


def test_recipe_names_any_data_module(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=4)
    lines = ["path,label", *(f"{path},{path.parent.name}" for path in sorted(root.rglob("*.jpg")))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    recipe = {
        "effective_batch": 8,
        "data": {
            "class_path": "ImageListDataModule",
            "init_args": {"file": str(tmp_path / "list.csv"), "image_size": 32, "num_workers": 0},
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = [*QUICK, "--config", str(tmp_path / "recipe.yaml"), "--data.init_args.batch_size=4"]
    result = main([*flags, "--trainer.max_epochs=1", "--folder", str(tmp_path / "run")])
    assert load_model(result.weights)[1].class_names == ["blue", "green", "red"]


def test_what_a_checkpoint_gave_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--model.model={SMALL_MODEL}", "--trainer.accelerator=cpu", *ONE_BATCH]
    first = main([*flags, "--data=DigitsDataModule", "--folder", str(tmp_path / "a")])
    capsys.readouterr()
    start = ["--model.checkpoint", str(first.weights), "--data=DigitsDataModule"]
    main([*flags, *start, "--folder", str(tmp_path / "b")])
    told = capsys.readouterr().err.splitlines()
    assert re.match(r"test_resnet starts from \d+ tensors of .*model\.safetensors", told[0])
    assert told[1].startswith("epoch")
    assert told[2].split()[0] == "1/1"


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="expected the package tensorboard for --tensorboard"):
        main([*QUICK, "--data=DigitsDataModule", "--tensorboard", "--folder", str(tmp_path / "run")])


def test_tensorboard_writes_into_the_folder(tmp_path: Path) -> None:
    flags = [*QUICK, *ONE_BATCH, "--data=DigitsDataModule", "--tensorboard"]
    result = main([*flags, "--folder", str(tmp_path / "run")])
    assert list((result.folder / "tensorboard").glob("events.*"))
    assert (result.folder / "config.yaml").is_file()


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_run_of_no_length_is_refused(limit: str, tmp_path: Path) -> None:
    flags = [*QUICK, "--data=DigitsDataModule", f"--trainer.{limit}=0"]
    with pytest.raises(UsageError, match=f"expected a {limit} of at least 1, got 0"):
        main([*flags, "--folder", str(tmp_path / "run")])


def test_missing_data_folder_is_named(tmp_path: Path) -> None:
    flags = ["--data=ImageFolderDataModule", f"--data.root={tmp_path / 'gone'}"]
    with pytest.raises(UsageError, match="gone is missing"):
        main([*QUICK, *flags, "--folder", str(tmp_path / "run")])


def test_flags_before_the_recipe_override_it_too(tmp_path: Path) -> None:
    flags = ["--model.lr=1e-4", "--config", "digits_shvit_s1", "--folder", str(tmp_path / "run"), *ONE_BATCH]
    result = main([f"--model.model={SMALL_MODEL}", *flags, "--trainer.enable_progress_bar=false"])
    record = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert (result.model, record["model"]["init_args"]["lr"]) == (SMALL_MODEL, 1e-4)


def test_short_flags_set_the_length_the_rate_the_batch_and_the_size(tmp_path: Path) -> None:
    short = ["--epochs", "1", "--lr=1e-4", "--batch-size", "8", "--size=64"]
    limits = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    result = main([*short, "--config=digits_shvit_s1", *QUICK, *limits, "--folder", str(tmp_path / "run")])
    record = yaml.safe_load((result.folder / "config.yaml").read_text())
    data = record["data"]["init_args"]
    assert record["trainer"]["max_epochs"] == len(result.history) == 1
    assert record["model"]["init_args"]["lr"] == 1e-4
    assert (data["batch_size"], data["image_size"]) == (8, 64)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--learning-rate=1", "--lr"),
        ("--epoch=3", "--epochs"),
        ("--img-size=64", "--size"),
        ("--workers=4", "--data.num_workers"),
        ("--model.learning_rate=1", "--lr"),
    ],
)
def test_unknown_flag_names_the_one_that_is_meant(flag: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"did you mean {re.escape(meant)}\?"):
        main(["--config", "digits_shvit_s1", "--folder", str(tmp_path / "run"), flag])


def test_all_options_are_listed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help-all"])
    shown = capsys.readouterr().out
    assert "--trainer.gradient_clip_val" in shown
    assert "--effective-batch" in shown


def test_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(UsageError, match=r"expected a recipe in UTF-8, but .*recipe\.yaml is not"):
        main(["--config", str(tmp_path / "recipe.yaml")])
