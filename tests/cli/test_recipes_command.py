"""`lightspine recipes`."""

import json

import pytest

from lightspine.recipes import list_published, list_recipes
from lightspine_cli.main import main


def test_every_recipe_is_listed_with_its_score(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert sorted(listed) == list_recipes()
    for entry in list_published():
        assert listed[entry.recipe]["published_top1"] == entry.top1
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
