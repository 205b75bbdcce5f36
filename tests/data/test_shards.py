"""WebDataset shards: patterns, labels, index files and damaged shards."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightspine.data import ShardSource, expand_shards
from lightspine.data.shards import INDEX_SUFFIX
from lightspine.errors import LightspineError, UsageError

COLOURS = [(10, 20, 30), (200, 100, 50), (0, 255, 0), (90, 90, 90), (5, 5, 250)]


def _png(colour: tuple[int, int, int], side: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(stream, "PNG")
    return stream.getvalue()


def _shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _two_shards(root: Path) -> str:
    for shard, numbers in enumerate([(0, 1, 2), (3, 4)]):
        members = {}
        for i in numbers:
            members |= {f"{i:04d}.png": _png(COLOURS[i]), f"{i:04d}.cls": str(i % 2).encode()}
        _shard(root / f"train-{shard:03d}.tar", members)
    return str(root / "train-{000..001}.tar")


def test_pattern_reads_all_shards_in_order(tmp_path: Path) -> None:
    source = ShardSource(_two_shards(tmp_path))
    assert [source.open(i).getpixel((3, 3)) for i in range(len(source))] == COLOURS
    assert source.read(4) == _png(COLOURS[4])
    assert source.written_labels() == ["0", "1", "0", "1", "0"]


def test_image_is_named_by_shard_and_member(tmp_path: Path) -> None:
    assert ShardSource(_two_shards(tmp_path)).name(3) == f"{tmp_path}/train-001.tar/0003.png"


def test_label_may_stand_before_the_image_and_in_json(tmp_path: Path) -> None:
    shard = _shard(
        tmp_path / "a.tar",
        {
            "x/1.json": json.dumps({"label": "owl", "species": 4}).encode(),
            "x/1.jpg": _png(COLOURS[0]),
            "x/2.jpg": _png(COLOURS[1]),
            "x/2.json": json.dumps({"label": "cat", "species": 5}).encode(),
            "readme.txt": b"no sample",
        },
    )
    assert ShardSource(shard).written_labels() == ["owl", "cat"]
    assert ShardSource(shard, label_key="species").written_labels() == ["4", "5"]


def test_sample_without_a_class_is_named(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.tar", {"1.jpg": _png(COLOURS[0]), "1.cls": b"3", "2.jpg": _png(COLOURS[1])})
    source = ShardSource(shard)
    assert source.labels.tolist() == [-1, -1]
    with pytest.raises(UsageError, match=r"class for every image, .*a\.tar/2\.jpg has none"):
        source.written_labels()


def test_index_is_kept_and_used_again(tmp_path: Path) -> None:
    pattern = _two_shards(tmp_path)
    ShardSource(pattern)
    kept = tmp_path / f"train-000.tar{INDEX_SUFFIX}"
    with np.load(kept) as arrays:
        changed = dict(arrays)
    changed["label_data"] = np.frombuffer(b"767", dtype=np.uint8)
    np.savez(kept, **changed)
    assert ShardSource(pattern).written_labels() == ["7", "6", "7", "1", "0"]


def test_index_is_made_anew_when_the_shard_changes(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.tar", {"1.png": _png(COLOURS[0]), "1.cls": b"3"})
    ShardSource(shard)
    _shard(shard, {f"{i}.png": _png(COLOURS[i]) for i in range(3)})
    source = ShardSource(shard)
    assert [source.open(i).getpixel((0, 0)) for i in range(len(source))] == COLOURS[:3]


def test_damaged_index_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pattern = _two_shards(tmp_path)
    ShardSource(pattern)
    (tmp_path / f"train-000.tar{INDEX_SUFFIX}").write_bytes(b"PK\x03\x04 cut off")
    assert len(ShardSource(pattern)) == 5
    assert "rebuilding the damaged index" in caplog.text


def test_index_folder_keeps_the_shards_folder_clean(tmp_path: Path) -> None:
    pattern = _two_shards(tmp_path / "data")
    ShardSource(pattern, index_folder=tmp_path / "indices")
    assert sorted(path.suffix for path in (tmp_path / "data").iterdir()) == [".tar", ".tar"]
    assert len(list((tmp_path / "indices").iterdir())) == 2


def test_index_that_cannot_be_kept_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blocked").write_text("a file where a folder is needed")
    source = ShardSource(_two_shards(tmp_path / "data"), index_folder=tmp_path / "blocked")
    assert len(source) == 5
    assert "cannot be saved" in caplog.text


def test_corrupt_image_is_named_and_spares_the_others(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.tar", {"1.png": _png(COLOURS[0])[:60], "2.png": _png(COLOURS[1])})
    source = ShardSource(shard)
    with pytest.raises(LightspineError, match=r"cannot read image .*a\.tar/1\.png"):
        source.open(0)
    assert source.open(1).getpixel((0, 0)) == COLOURS[1]


def test_links_and_folders_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(_png((1, 2, 3)))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        folder = tarfile.TarInfo("2.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("3.png")
        info.size = len(_png(COLOURS[2]))
        archive.addfile(info, io.BytesIO(_png(COLOURS[2])))
    source = ShardSource(tmp_path / "a.tar")
    assert [source.name(i).rpartition("/")[2] for i in range(len(source))] == ["3.png"]


@pytest.mark.parametrize("length", [700, 1024, 1100, 2048, 3000])
def test_shard_that_was_cut_off_is_named(tmp_path: Path, length: int) -> None:
    shard = _shard(tmp_path / "a.tar", {f"{i}.png": _png(COLOURS[i]) for i in range(3)})
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(LightspineError, match=r"cannot read the shard .*a\.tar"):
        ShardSource(shard)


def test_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar file at all" * 100)
    with pytest.raises(LightspineError, match=r"cannot read the shard .*a\.tar"):
        ShardSource(tmp_path / "a.tar")


def test_compressed_shard_is_refused(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.tar", {"1.png": _png(COLOURS[0])})
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(UsageError, match="compressed with gzip"):
        ShardSource(shard)


def test_shard_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.tar, which has none"):
        ShardSource(_shard(tmp_path / "a.tar", {"1.txt": b"x", "1.cls": b"2"}))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"label": [1]}', b'{"label": true}'])
def test_label_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    shard = _shard(tmp_path / "a.tar", {"1.png": _png(COLOURS[0]), "1.json": content})
    with pytest.raises(LightspineError, match=r"label.* .*a\.tar/1\.json"):
        ShardSource(shard)


def test_braces_hold_ranges_and_lists(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10"):
        _shard(tmp_path / f"{name}.tar", {"1.png": _png(COLOURS[0])})
    found = expand_shards(str(tmp_path / "{a,b}-{08..10}.tar"))
    assert [path.stem for path in found] == ["a-08", "a-09", "a-10", "b-08", "b-09", "b-10"]


def test_folder_stands_for_its_tar_files(tmp_path: Path) -> None:
    _two_shards(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert [path.name for path in expand_shards(tmp_path)] == ["train-000.tar", "train-001.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train-{000..002}.tar", r"train-002\.tar does not exist"),
        ("train-{002..000}.tar", "ascending range"),
        ("train-{x}.tar", r"a range such as \{000\.\.012\}"),
        ("empty", r"\.tar files in .*empty, which has none"),
    ],
)
def test_wrong_pattern_is_refused(tmp_path: Path, pattern: str, message: str) -> None:
    _two_shards(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        expand_shards(str(tmp_path / pattern))
