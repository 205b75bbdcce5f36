"""`lightspine weights`: lists published and cached weights, and checks the cached files."""

import json
from pathlib import Path

import pytest

import lightspine
from lightspine.models.dense_weights import DENSE_WEIGHTS
from lightspine.models.weights import fetch_weights
from lightspine_cli.main import main
from support.file_server import file_server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one downloaded file."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    [cfg] = lightspine.models.registry.published_cfgs("shvit_s1").values()
    with file_server() as server:
        cfg.url = server.add("/shvit_s1.pth", b"PK and so on")
        fetch_weights("shvit_s1", cfg, tmp_path)
    return tmp_path


def test_all_published_weights_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "--all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in rows]
    assert names == [*lightspine.list_models(pretrained=True), *DENSE_WEIGHTS]
    tiny = rows[names.index("vmamba_tiny.in1k")]
    assert {"published": "82.6 % top-1", "license": "mit"}.items() <= tiny.items()
    assert tiny["source"].startswith("https://github.com/MzeroMiko/VMamba/releases/download/")


def test_cached_weights_are_listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "--cache-dir", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "shvit_s1.in1k" in out
    assert "SHA-256" in out


def test_intact_file_passes_the_check(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "--verify", "--cache-dir", str(cache)]) == 0
    assert "verified" in capsys.readouterr().out


def test_changed_file_fails_the_check(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "shvit_s1.pth").write_bytes(b"PK and something else")
    assert main(["weights", "--verify", "--json", "--cache-dir", str(cache)]) == 1
    [row] = json.loads(capsys.readouterr().out)
    assert row["problem"].startswith("its SHA-256 is")


def test_empty_cache_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "--cache-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no weights in ")


def test_published_name_stands_for_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file that was put into the cache of torch.hub by hand.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    lightspine.save_checkpoint(lightspine.create_model("shvit_s1"), folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "shvit_s1.pth")
    assert main(["convert", "shvit_s1.in1k", str(tmp_path / "out.safetensors")]) == 0
    assert "shvit_s1, loaded 471 tensors" in capsys.readouterr().out
