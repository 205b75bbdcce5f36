"""`lightspine recipes`: listing and printing recipes."""

import json

import pytest

from lightspine.recipes import SCORES, list_published, list_recipes
from lightspine_cli.main import main


def test_every_recipe_is_listed_with_its_score(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert sorted(listed) == list_recipes()
    for entry in list_published():
        for score in SCORES:
            assert listed[entry.recipe][f"published_{score}"] == getattr(entry, score)
        assert listed[entry.recipe]["source"] == entry.source


def test_line_of_a_recipe_tells_model_data_batch_and_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "efficientvim_m2_e450"]) == 0
    [line] = [row for row in capsys.readouterr().out.splitlines() if row.startswith("classification/")]
    assert line.split()[1:] == ["efficientvim_m2", "classification", "ImageNet-1k", "2,048", "460", "75.8"]


def test_recipe_without_a_printed_score_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "digits_vim", "--json"]) == 0
    [item] = json.loads(capsys.readouterr().out)
    assert (item["published_top1"], item["data"], item["batch_size"]) == (None, "digits", 32)


def test_name_that_no_recipe_has_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "resnet"]) == 2
    assert "no recipe has 'resnet'" in capsys.readouterr().err


def test_scores_of_a_segmenter_are_given_at_one_size_and_at_several(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["recipes", "upernet_vmamba_tiny_ade20k"]) == 0
    [line] = [row for row in capsys.readouterr().out.splitlines() if row.startswith("segmentation/")]
    assert line.split()[-5:] == ["16", "127", "47.9", "/", "48.8"]


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_table_of_a_task_holds_its_recipes_alone_in_120_columns(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "--json"]) == 0
    expected = [item["name"] for item in json.loads(capsys.readouterr().out) if item["task"] == task]
    assert main(["recipes", "--task", task]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [
        line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in list_recipes()
    ] == expected
    assert max(map(len, lines)) <= 120


def test_length_of_a_run_that_counts_steps_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cascade_mask_rcnn_vim_tiny", "--json"]) == 0
    [item] = json.loads(capsys.readouterr().out)
    assert (item["steps"], item["epochs"]) == (184_375, 101)


def test_task_without_a_recipe_of_that_name_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "digits", "--task", "detection"]) == 2
    assert "no detection recipe has 'digits'" in capsys.readouterr().err
