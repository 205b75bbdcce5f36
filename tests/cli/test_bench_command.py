"""What `lightspine bench ops` prints and refuses."""

import json

import pytest

from lightspine_cli.main import main

TINY = ["bench", "ops", "--shapes", "vmamba-4", "--batch", "1", "--threads", "1", "--repeats", "1"]


def test_json_holds_settings_rows_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--parts", "time", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["threads"], report["repeats"]) == (1, 1)
    assert [(row["case"]["name"], row["batch"], row["memory"]) for row in report["rows"]] == [
        ("vmamba-4", 1, None)
    ]
    assert {check["what"] for check in report["checks"]} == {
        "forward / floor",
        "torch / forward",
        "forward and backward / forward",
    }
    assert report["system"]["versions"]["torch"]


def test_table_tells_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--parts", "time,memory"]) == 0
    shown = capsys.readouterr().out
    assert "\nvmamba-4 " in shown
    for target in ("forward / floor", "torch / forward", "forward and backward / forward"):
        assert f"\n{target} " in shown


def test_help_of_ops_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--shapes", "--batch", "--threads", "--repeats", "--json"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["bench"], "ops"),
        (["bench", "models"], "models"),
        (["bench", "ops", "--shapes", "vmamba-9"], "got vmamba-9"),
        (["bench", "ops", "--batch", "one"], "expected numbers such as 1,8, got 'one'"),
        (["bench", "ops", "--batch", "0"], "must be at least 1, got 0"),
        (["bench", "ops", "--parts", "speed"], "got speed"),
    ],
    ids=["no kind", "unknown kind", "unknown shape", "no number", "batch of none", "unknown part"],
)
def test_wrong_use_is_one_sentence_and_status_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert part in lines[0]
