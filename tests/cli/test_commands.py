"""Output of the commands that need no training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lightspine
from lightspine.models import get_record
from lightspine.models.saving import save_checkpoint
from lightspine_cli.main import main


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = lightspine.create_model("efficientvim_m1", num_classes=3)
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    return save_checkpoint(model, path, class_names=["ant", "bee", "cat"])


def test_list_json_holds_every_record(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _json(capsys, "list")
    assert [row["name"] for row in rows] == lightspine.list_models()
    assert {row["name"]: row["params"] for row in rows} == {
        name: get_record(name).params for name in lightspine.list_models()
    }


def test_list_takes_a_pattern_or_a_part_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert _json(capsys, "list", "shvit*") == _json(capsys, "list", "shvit")


def test_list_table_is_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in lightspine.list_models():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert f"{get_record(name).params:,}" in line


def test_list_explains_each_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    notes = {get_record(name).published.note for name in lightspine.list_models()} - {""}
    assert [note for note in notes if f") {note}\n" not in shown] == []


def test_doctor_tells_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    report = _json(capsys, "doctor")
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["scan_backends"]["reference"]["runs"] is True


def test_doctor_gives_a_reason_for_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert [
        name for name, entry in _json(capsys, "doctor")["scan_backends"].items() if not entry["reason"]
    ] == []


def test_doctor_prints_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "scan backend" in shown
    assert "torch_threads" in shown


def test_info_counts_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _json(capsys, "info", "shvit_s1")
    assert (facts["family"], facts["params"]) == ("shvit", 6_330_808)
    assert [stage["stride"] for stage in facts["stages"]] == [16, 32, 64]


def test_info_size_changes_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (_json(capsys, "info", "shvit_s1", "--size", size)["macs_conv"] for size in ("64", "128"))
    assert large == pytest.approx(4 * small, rel=0.05)


def test_info_takes_a_timm_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "resnet18"]) == 0
    assert "11,689,512" in capsys.readouterr().out


def test_info_identifies_a_file(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    facts = _json(capsys, "info", str(checkpoint))
    assert (facts["saved_as"], facts["classes"]) == ("efficientvim_m1", ["ant", "bee", "cat"])
    assert [entry["model"] for entry in facts["entries"]] == ["efficientvim_m1"]


def test_info_lists_the_entries_of_an_official_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = lightspine.create_model("shvit_s1").state_dict()
    path = tmp_path / "official.pth"
    torch.save({"model": state, "model_ema": state, "epoch": 3}, path)
    entries = _json(capsys, "info", str(path))["entries"]
    assert [(entry["name"], entry["model"], entry["exact"]) for entry in entries] == [
        ("model", "shvit_s1", True),
        ("model_ema", "shvit_s1", True),
    ]


def test_convert_writes_a_file_that_gives_the_same_logits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = lightspine.create_model("shvit_s1").eval()
    source, target = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    torch.save({"model": model.state_dict()}, source)
    assert main(["convert", str(source), str(target)]) == 0
    assert "shvit_s1" in capsys.readouterr().out
    images = torch.randn(1, 3, 64, 64)
    converted = lightspine.create_model("shvit_s1", checkpoint=target).eval()
    assert torch.equal(converted(images), model(images))
