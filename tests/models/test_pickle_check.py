"""Pickled checkpoints that would end or block the process are refused before PyTorch reads them."""

import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lightspine
from lightspine.errors import LightspineError
from lightspine.models.checkpoint import read_checkpoint
from lightspine.models.pickle_check import check_pickled_file

NESTED_KEY = b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s."
# A tuple of two times the same tuple, fifty times: 2^50 parts.
SHARED_KEY = (
    b"\x80\x02})" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(50)) + b"K\x01s."
)


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", content)
        file.writestr("a/version", "3")
        file.writestr("a/byteorder", "little")
    return path


def legacy(path: Path, content: bytes) -> Path:
    head = [
        pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    ]
    path.write_bytes(b"".join([*head, content]))
    return path


@pytest.mark.parametrize("content", [NESTED_KEY, SHARED_KEY], ids=["nested", "shared"])
@pytest.mark.parametrize("write", [archive, legacy], ids=lambda write: write.__name__)
def test_deep_key_is_refused(tmp_path: Path, content: bytes, write: object) -> None:
    with pytest.raises(
        LightspineError, match=r"is refused: it holds a value that is nested more than 200 times"
    ):
        read_checkpoint(write(tmp_path / "deep.pth", content))


def test_process_survives_a_deep_key(tmp_path: Path) -> None:
    path = archive(tmp_path / "deep.pth", NESTED_KEY)
    code = "import sys; from lightspine_cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "is refused" in done.stderr


def test_archive_that_claims_more_than_it_has_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.pth", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    # The size of the first member, in the central directory.
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    with pytest.raises(LightspineError, match="its archive claims more bytes than"):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy_format", [False, True], ids=["zip", "legacy"])
def test_usual_checkpoint_passes(tmp_path: Path, legacy_format: bool) -> None:
    model = lightspine.create_model("shvit_s1", num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": {"a": [1, (2,)]},
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy_format)
    assert read_checkpoint(tmp_path / "a.pth").entries["model"].keys() == model.state_dict().keys()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_every_protocol_are_followed(tmp_path: Path, protocol: int) -> None:
    value = {
        "a": [1, (2, 3, 4, {5})],
        "b": {"c": frozenset([b"x", 1.5])},
        "d": bytearray(b"q"),
        "e": [[[None]]],
    }
    value["again"] = value["a"]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    check_pickled_file(tmp_path / "a.pkl")
    deep: object = ()
    for _ in range(300):
        deep = (deep,)
    (tmp_path / "deep.pkl").write_bytes(pickle.dumps(deep, protocol=protocol))
    with pytest.raises(LightspineError):
        check_pickled_file(tmp_path / "deep.pkl")


@pytest.mark.parametrize("content", [b"", b"\x80", b"junk", b"PK\x03\x04junk"], ids=repr)
def test_no_pickle_is_left_to_pytorch(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    check_pickled_file(tmp_path / "a.pth")


@pytest.mark.parametrize("opcode", [b"X", b"T", b"B", b"\x8b"], ids=repr)
def test_length_beyond_the_file_is_refused_before_it_is_read(tmp_path: Path, opcode: bytes) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"\x80\x02" + opcode + (2**31 - 1).to_bytes(4, "little") + b"abc.")
    with pytest.raises(LightspineError, match="claims 2147483647 bytes, of which the file has 4"):
        check_pickled_file(file)
