"""Short flags of `lightspine train`: what they stand for, and suggestions."""

import pytest

from lightspine.errors import UsageError
from lightspine.training.short_flags import expand_short_flags, suggest_flag


def test_short_flags_are_replaced_wherever_they_are() -> None:
    given = ["--epochs", "3", "--config", "digits_shvit_s1", "--lr=1e-4", "--batch_size", "16", "--seed=1"]
    assert expand_short_flags(given) == [
        "--trainer.max_epochs=3",
        "--config",
        "digits_shvit_s1",
        "--model.init_args.lr=0.0001",
        "--data.init_args.batch_size=16",
        "--seed=1",
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--data=ImageFolderDataModule"], ["image_size=96"]),
        (["--config", "image_folder"], ["image_size=96"]),
        (["--config=finetune_coco"], ["shorter=96", "longest=160"]),
        (["--model", "DetectionTask"], ["shorter=96", "longest=160"]),
        (
            ["--config=finetune_segmentation_folder"],
            ["crop=[96, 96]", "scale=[96, 384]"],
        ),
        (["--config=finetune_coco", "--model=ClassificationTask"], ["image_size=96"]),
    ],
)
def test_size_sets_the_sizes_of_the_task(given: list[str], expected: list[str]) -> None:
    expanded = expand_short_flags([*given, "--size=96"])
    assert expanded == [*given, *(f"--data.init_args.{setting}" for setting in expected)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "many"], "expected --epochs with an integer above 0, got 'many'"),
        (["--epochs=0"], "got '0'"),
        (["--lr"], "expected --lr with a number above 0, got ''"),
        (["--lr=nan"], "got 'nan'"),
        (["--size=1.5"], "expected --size with an integer above 0, got '1.5'"),
    ],
)
def test_wrong_value_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        expand_short_flags(given)


@pytest.mark.parametrize(
    ("name", "flag"),
    [("--learning_rate", "--lr"), ("--epoch", "--epochs"), ("--imgsz", "--size"), ("--nonsense", None)],
)
def test_suggestion_for_an_unknown_flag(name: str, flag: str | None) -> None:
    assert suggest_flag(name) == flag
