"""Pickled checkpoints that would end or block the process are refused before PyTorch reads them."""

import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def _damage_checksum(content: bytearray) -> None:
    at = content.index(b"PK\x01\x02") + 16
    content[at : at + 4] = bytes(4)


def _damage_local_name(content: bytearray) -> None:
    content[30:34] = b"XXXX"


@pytest.mark.parametrize("damage", [_damage_checksum, _damage_local_name], ids=["checksum", "name"])
def test_archive_that_only_pytorch_reads_is_refused(
    tmp_path: Path, damage: Callable[[bytearray], None]
) -> None:
    path = archive(tmp_path / "deep.pth", NESTED_KEY)
    content = bytearray(path.read_bytes())
    damage(content)
    path.write_bytes(content)
    with pytest.raises(LightspineError, match="not a complete PyTorch checkpoint"):
        check_pickled_file(path)


def test_pickle_before_an_archive_is_followed(tmp_path: Path) -> None:
    harmless = archive(tmp_path / "harmless.pth", b"\x80\x02}.").read_bytes()
    path = legacy(tmp_path / "deep.pth", NESTED_KEY + harmless)
    with pytest.raises(LightspineError, match="nested more than 200 times"):
        check_pickled_file(path)


def test_tar_archive_is_refused_before_its_headers_are_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 10**9
    (tmp_path / "a.pth").write_bytes(header.tobuf(tarfile.USTAR_FORMAT))
    with pytest.raises(LightspineError, match="tar archive"):
        read_checkpoint(tmp_path / "a.pth")


# The hashes of -1 and -2 are equal, and with them those of all tuples of them.
_EQUAL_HASHES = b"".join(
    b"("
    + b"".join(b"J" + (-1 - (number >> bit & 1)).to_bytes(4, "little", signed=True) for bit in range(11))
    + b"t"
    for number in range(2**11)
)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}(" + _EQUAL_HASHES.replace(b"t", b"tN") + b"u.",
        b"\x80\x02c__builtin__\nset\n](" + _EQUAL_HASHES + b"e\x85R.",
        b"\x80\x02" + b"(" * 3_100_000 + b".",
    ],
    ids=["keys", "set", "marks"],
)
def test_pickle_that_takes_minutes_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(LightspineError, match="keys that are no strings, which no checkpoint has"):
        check_pickled_file(archive(tmp_path / "a.pth", content))


def test_attributes_of_a_dictionary_are_ignored(tmp_path: Path) -> None:
    weights: Any = OrderedDict(weight=torch.ones(2))
    weights.keys = weights.get = weights.values = 5
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth").entries["state_dict"]
    assert found.keys() == {"weight"}


def test_attributes_of_a_tensor_are_ignored(tmp_path: Path) -> None:
    weight: Any = torch.nn.Parameter(torch.ones(2))
    weight.element_size = 3
    torch.save({"state_dict": {"weight": weight}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").entries["state_dict"]["weight"].element_size() == 4


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "its tensors claim 4,000,000,000,000 bytes"),
        (torch.empty(3, device="meta"), "its tensor weight has no values"),
    ],
    ids=["repeated", "meta"],
)
def test_tensor_without_values_in_the_file_is_refused(
    tmp_path: Path, tensor: torch.Tensor, message: str
) -> None:
    torch.save({"weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(LightspineError, match=message):
        read_checkpoint(tmp_path / "a.pth")


def test_tensor_of_a_size_in_the_pickle_is_refused(tmp_path: Path) -> None:
    # torch.Tensor(2 ** 20), whose memory was never written.
    call = b"\x80\x02}(X\x06\x00\x00\x00weightctorch\nTensor\nJ\x00\x00\x10\x00\x85Ru."
    with pytest.raises(LightspineError, match="its tensors claim 4,194,304 bytes"):
        read_checkpoint(archive(tmp_path / "a.pth", call))


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


@pytest.mark.parametrize("content", [b"", b"\x80", b"junk"], ids=repr)
def test_no_pickle_is_left_to_pytorch(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    check_pickled_file(tmp_path / "a.pth")


@pytest.mark.parametrize("opcode", [b"X", b"T", b"B", b"\x8b"], ids=repr)
def test_length_beyond_the_file_is_refused_before_it_is_read(tmp_path: Path, opcode: bytes) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"\x80\x02" + opcode + (2**31 - 1).to_bytes(4, "little") + b"abc.")
    with pytest.raises(LightspineError, match="claims 2147483647 bytes, of which the file has 4"):
        check_pickled_file(file)
