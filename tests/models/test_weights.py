"""Published weights by name: downloads and their faults, the cache, and what is loaded."""

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine.models.registry import published_cfgs
from lightspine.models.weights import WeightsFile, cached_weights, download, hub_download
from support.file_server import FileServer, file_server
from support.reference import fill_checkpoint, read_figure

CONTENT = b"PK" + bytes(range(256)) * 64


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    # A proxy of the machine must not be asked for local addresses.
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with file_server() as running:
        yield running


@pytest.fixture(scope="module")
def official_shvit() -> bytes:
    """A file as the authors publish it: shvit_s1 with filled tensors."""
    file = io.BytesIO()
    layout = read_figure("shvit/shvit_s1")["checkpoint"]
    torch.save({"model": fill_checkpoint(layout)}, file)
    return file.getvalue()


def test_file_is_downloaded_once(server: FileServer, tmp_path: Path) -> None:
    url = server.add("/a.pth", CONTENT)
    paths = [download(url, tmp_path / "cache") for _ in range(2)]
    assert paths[0] == paths[1] == tmp_path / "cache" / "a.pth"
    assert paths[0].read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_cut_connection_is_resumed_where_it_stopped(server: FileServer, tmp_path: Path) -> None:
    url = server.add("/a.pth", CONTENT, cut_after=[1000, 500])
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert [asked for _, _, asked in server.requests] == [None, "bytes=1000-", "bytes=1500-"]


def test_download_that_is_cut_again_and_again_says_so_and_continues_in_the_next_call(
    server: FileServer, tmp_path: Path
) -> None:
    url = server.add("/a.pth", CONTENT, cut_after=[1000, 1000, 1000])
    with pytest.raises(LightspineError, match=rf"was cut after 3000 of {len(CONTENT)} bytes of a\.pth"):
        download(url, tmp_path)
    assert not (tmp_path / "a.pth").exists()
    assert download(url, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1][2] == "bytes=3000-"


def test_server_without_ranges_sends_the_whole_file_again(server: FileServer, tmp_path: Path) -> None:
    url = server.add("/a.pth", CONTENT, cut_after=[1000], ranges=False)
    assert download(url, tmp_path).read_bytes() == CONTENT


def test_file_that_changed_while_it_was_cut_starts_again(server: FileServer, tmp_path: Path) -> None:
    url = server.add("/a.pth", CONTENT, cut_after=[1000, 0, 0])
    with pytest.raises(LightspineError, match="was cut"):
        download(url, tmp_path)
    server.add("/a.pth", CONTENT[:500])
    assert download(url, tmp_path).read_bytes() == CONTENT[:500]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"status": 404}, "the server answered 404 Not Found"),
        ({"status": 503}, "the server answered 503 Service Unavailable"),
        ({"content_type": "text/html; charset=utf-8"}, "is a web page, expected a checkpoint"),
    ],
    ids=["404", "503", "web page"],
)
def test_refusal_of_the_server_is_one_sentence(
    server: FileServer, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(LightspineError, match=message):
        download(server.add("/a.pth", CONTENT, **options), tmp_path)
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"<!doctype html><title>Sign in</title>", "a web page"), (b"not found", "no checkpoint"), (b"", "no")],
    ids=["web page", "text", "nothing"],
)
def test_something_else_than_a_checkpoint_is_not_kept(
    server: FileServer, tmp_path: Path, content: bytes, what: str
) -> None:
    with pytest.raises(LightspineError, match=f"sent {what}.*save the file as .*a.pth"):
        download(server.add("/a.pth", content), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pth", ".part")]


def test_unreachable_server_is_one_sentence(tmp_path: Path) -> None:
    with file_server() as stopped:
        url = f"{stopped.url}/a.pth"
    with pytest.raises(
        LightspineError, match=r"cannot download http.*Connection refused; .* save the file as .*a\.pth"
    ):
        download(url, tmp_path)


def test_offline_process_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"a\.pth is not in .* and HF_HUB_OFFLINE is set"):
        download("http://127.0.0.1:1/a.pth", tmp_path)


def test_too_small_a_disk_is_told_before_the_download(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LightspineError, match=r"0 MiB are needed in .*, 0 MiB are free"):
        download(server.add("/a.pth", CONTENT), tmp_path)


def test_full_disk_is_one_sentence(server: FileServer, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    # Every write to /dev/full fails like one to a full disk.
    (tmp_path / ".a.pth.part").symlink_to("/dev/full")
    with pytest.raises(LightspineError, match="no space is left in"):
        download(server.add("/a.pth", CONTENT), tmp_path)


def test_two_downloads_at_once_share_the_file(server: FileServer, tmp_path: Path) -> None:
    url = server.add("/a.pth", CONTENT * 100)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: download(url, tmp_path), range(2)))
    assert paths[0].read_bytes() == CONTENT * 100
    assert len(server.requests) == 1


def test_pretrained_model_has_the_tensors_of_the_official_file(
    server: FileServer, tmp_path: Path, official_shvit: bytes
) -> None:
    url = server.add("/v1.0/shvit_s1.pth", official_shvit)
    model = lightspine.create_model(
        "shvit_s1", pretrained=True, pretrained_cfg_overlay={"url": url}, cache_dir=tmp_path
    )
    (tmp_path / "copy.pth").write_bytes(official_shvit)
    expected = lightspine.create_model("shvit_s1", checkpoint=tmp_path / "copy.pth").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    sha256 = hashlib.sha256(official_shvit).hexdigest()
    assert (model.load_report.url, model.load_report.sha256) == (url, sha256)
    [record] = cached_weights(tmp_path)
    assert (record.name, record.source, record.sha256) == ("shvit_s1.in1k", url, sha256)
    assert record.license == "mit"
    assert record.verify() is None


@pytest.mark.parametrize("options", [{"num_classes": 7}, {"in_chans": 1}, {"features_only": True}], ids=str)
def test_pretrained_weights_are_adapted(
    server: FileServer, tmp_path: Path, official_shvit: bytes, options: dict[str, int]
) -> None:
    overlay = {"url": server.add("/shvit_s1.pth", official_shvit)}
    (tmp_path / "copy.pth").write_bytes(official_shvit)
    torch.manual_seed(0)
    model = lightspine.create_model(
        "shvit_s1", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path, **options
    ).eval()
    expected = lightspine.create_model("shvit_s1", checkpoint=tmp_path / "copy.pth", **options).eval()
    tensors = expected.state_dict()
    for name, tensor in model.state_dict().items():
        # A classifier of other classes is new.
        assert ("head" in name and "num_classes" in options) or torch.equal(tensor, tensors[name])


def test_pretrained_file_of_another_model_is_refused(
    server: FileServer, tmp_path: Path, official_shvit: bytes
) -> None:
    overlay = {"url": server.add("/shvit_s1.pth", official_shvit)}
    with pytest.raises(LightspineError, match="is a checkpoint of shvit_s1, expected shvit_s2"):
        lightspine.create_model(
            "shvit_s2", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path
        )


def test_saved_model_does_not_download_again(
    server: FileServer, tmp_path: Path, official_shvit: bytes
) -> None:
    overlay = {"url": server.add("/shvit_s1.pth", official_shvit)}
    model = lightspine.create_model(
        "shvit_s1", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path
    )
    lightspine.save_checkpoint(model, tmp_path / "model.safetensors")
    before = len(server.requests)
    again, metadata = lightspine.load_model(tmp_path / "model.safetensors")
    assert metadata.kwargs == {}
    assert len(server.requests) == before
    assert torch.equal(again.state_dict()["stem.0.conv.weight"], model.state_dict()["stem.0.conv.weight"])


def test_changed_file_of_the_cache_is_found(tmp_path: Path, server: FileServer) -> None:
    path = download(server.add("/a.pth", CONTENT), tmp_path)
    path.write_bytes(CONTENT + b"x")
    [record] = cached_weights(tmp_path)
    assert "its SHA-256 is" in str(record.verify())
    path.unlink()
    assert record.verify() == "the file is missing"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"path": 1}', '{"path": "a", "name": "b"}'])
def test_other_files_of_the_cache_are_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert cached_weights(tmp_path) == []


def test_weights_that_no_program_can_download_are_described() -> None:
    with pytest.raises(UsageError, match=r"efficientmod_s .published: 81\.9 % top-1. .*drive\.google\.com"):
        lightspine.create_model("efficientmod_s", pretrained=True)


def test_unknown_tag_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no weights with the tag 'in22k': expected e300_in1k, e450_in1k"):
        lightspine.create_model("efficientvim_m1.in22k")


def test_tag_selects_the_weights() -> None:
    model = lightspine.create_model("efficientvim_m1.e450_in1k")
    assert model.pretrained_cfg["hf_hub_id"] == "timm/efficientvim_m1.e450_in1k"
    assert model.pretrained_cfg["tag"] == "e450_in1k"
    assert model.init_args["name"] == "efficientvim_m1"


def test_model_saved_in_timm_layout_is_created_from_its_folder(tmp_path: Path) -> None:
    model = lightspine.create_model("shvit_s1", num_classes=3).eval()
    timm.models.save_for_hf(model, str(tmp_path), model_args={"num_classes": 3}, safe_serialization=True)
    again = lightspine.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    # timm has a model of this name, too.
    assert type(again).__module__ == "lightspine.models.shvit"
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_timm_builds_the_model_that_was_saved_and_not_its_own_of_this_name(tmp_path: Path) -> None:
    model = lightspine.create_model("shvit_s1", num_classes=3).eval()
    timm.models.save_for_hf(model, str(tmp_path), model_args={"num_classes": 3}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_model_is_created_by_its_name_in_timm() -> None:
    model = lightspine.create_model("lightspine_shvit_s1.in1k", num_classes=3)
    assert type(model).__module__ == "lightspine.models.shvit"
    assert model.init_args["name"] == "shvit_s1"
    assert lightspine.optimize(model.eval()).pretrained_cfg["architecture"] == "lightspine_shvit_s1"
    # timm's own model keeps its name.
    assert type(timm.create_model("shvit_s1")).__module__ == "timm.models.shvit"


def test_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LightspineError, match="holds no model in timm's layout"):
        lightspine.create_model(f"local-dir:{tmp_path}")


def test_checkpoint_and_pretrained_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected pretrained=True or a checkpoint, received both"):
        lightspine.create_model("shvit_s1", pretrained=True, checkpoint=tmp_path / "a.pth")


def test_models_with_weights_are_listed_with_their_tags() -> None:
    names = lightspine.list_models("vmamba_*", pretrained=True)
    assert names == ["vmamba_tiny.in1k", "vmamba_small.in1k", "vmamba_base.in1k"]
    assert set(names) <= set(timm.list_models("vmamba_*", pretrained=True))


def test_every_published_file_has_a_source_and_a_license() -> None:
    for name in lightspine.list_models():
        for cfg in published_cfgs(name).values():
            assert bool(cfg.url) != bool(cfg.hf_hub_id)
            assert cfg.license


# Runs in a process of its own, because huggingface_hub reads its settings when it is imported.
_HUB = """
import json, sys
import lightspine
from lightspine.errors import LightspineError
from lightspine.models.weights import cached_weights

def create(name, **options):
    try:
        return lightspine.create_model(name, **options)
    except LightspineError as error:
        return str(error)

out = {}
model = create("vim_tiny", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "us/several"})
out["several"] = model if isinstance(model, str) else model.load_report.url
model = create("hf-hub:us/ours")
out["ours"] = model if isinstance(model, str) else [type(model).__module__, model.num_classes]
model = create("hf-hub:us/ours", pretrained=True)
out["ours weights"] = model if isinstance(model, str) else float(model.head.weight.abs().max())
out["absent"] = create("hf-hub:us/absent", pretrained=True)
out["other"] = create("vim_base", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "us/several"})
out["cached"] = [record.name for record in cached_weights()]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def hub_files() -> dict[str, dict[str, bytes]]:
    small = io.BytesIO()
    torch.save({"model": lightspine.create_model("vim_small").state_dict()}, small)
    tiny = io.BytesIO()
    torch.save({"model": lightspine.create_model("vim_tiny").state_dict()}, tiny)
    model = lightspine.create_model("vim_tiny", num_classes=3)
    torch.nn.init.constant_(model.head.weight, 5.0)
    config = {
        "architecture": "vim_tiny",
        "num_classes": 3,
        "model_args": {"num_classes": 3},
        "pretrained_cfg": {"num_classes": 3, "input_size": [3, 224, 224], "tag": "in1k"},
    }
    return {
        "us/several": {"README.md": b"#", "a.pth": small.getvalue(), "b.pth": tiny.getvalue()},
        "us/ours": {
            "config.json": json.dumps(config).encode(),
            "model.safetensors": save(model.state_dict()),
        },
    }


def run_hub(server: FileServer, folder: Path, **environment: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", _HUB],
        env=os.environ
        | {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf"), "TORCH_HOME": str(folder / "torch")}
        | {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hub_repositories(server: FileServer, tmp_path: Path, hub_files: dict[str, dict[str, bytes]]) -> None:
    for name, files in hub_files.items():
        server.add_repository(name, files)
    out = run_hub(server, tmp_path)
    assert out["several"] == "hf-hub:us/several/b.pth", "the file is told by its tensors"
    assert out["ours"] == ["lightspine.models.vim", 3]
    assert out["ours weights"] == 5.0
    assert "cannot download hf-hub:us/absent/config.json" in str(out["absent"])
    assert "no file of the hub repository us/several is a checkpoint of vim_base" in str(out["other"])
    assert "vim_tiny.in1k" in out["cached"]
    # Everything comes from the cache the second time, but for the two errors.
    again = run_hub(server, tmp_path, HF_HUB_OFFLINE="1")
    assert {key: again[key] for key in ("several", "ours", "ours weights")} == {
        key: out[key] for key in ("several", "ours", "ours weights")
    }


def test_hub_that_cannot_be_reached_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # huggingface_hub tries 6 times, with pauses of 1 to 8 seconds; time is not measured here.
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("another try to connect")
    )
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(
        LightspineError, match=r"cannot download hf-hub:us/absent/a\.pth: .*Connection refused"
    ):
        hub_download("us/absent", "a.pth", tmp_path)
    overlay = {"hf_hub_id": "us/absent"}
    for name in ("vim_tiny", "timm/test_vit"):
        with pytest.raises(LightspineError, match=r"cannot download hf-hub:.*Connection refused"):
            lightspine.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)


@pytest.mark.slow
def test_files_of_a_hub_that_cannot_be_reached_come_from_the_cache(
    server: FileServer, tmp_path: Path, hub_files: dict[str, dict[str, bytes]]
) -> None:
    server.add_repository("us/ours", hub_files["us/ours"])
    online = run_hub(server, tmp_path)
    server.url = "http://127.0.0.1:9"
    offline = run_hub(server, tmp_path)
    assert offline["ours weights"] == online["ours weights"] == 5.0
    assert "Connection refused" in str(offline["absent"])


def test_record_survives_json() -> None:
    record = WeightsFile(
        name="a.b", path=Path("c"), source="d", sha256="e", size=1, license="mit", downloaded="2026"
    )
    assert WeightsFile(**json.loads(json.dumps(record.as_dict())) | {"path": Path("c")}) == record
