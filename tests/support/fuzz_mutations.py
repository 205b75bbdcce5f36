"""Mutations of files: of bytes, of JSON values and of the chunks of a PNG."""

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]
"""Function (content, random numbers) -> changed content."""

_EXTREMES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    """Flip up to eight bits, mostly near the start or the end, where headers are."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 2, 8))):
        changed[_position(content, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Cut the end off."""
    return content[: draw.choice((_position(content, draw), draw.randrange(min(64, len(content)))))]


def set_size(content: bytes, draw: random.Random) -> bytes:
    """Overwrite two, four or eight bytes with an extreme integer."""
    width = draw.choice((2, 4, 8))
    value = draw.choice(_EXTREMES) % 2 ** (8 * width)
    at = _position(content, draw)
    return content[:at] + value.to_bytes(width, draw.choice(("little", "big"))) + content[at + width :]


def move_block(content: bytes, draw: random.Random) -> bytes:
    """Copy a block of bytes to another place, or remove it."""
    start, target = _position(content, draw), _position(content, draw)
    block = content[start : start + draw.randrange(1, 200)]
    if draw.random() < 0.3:
        return content[:start] + content[start + len(block) :]
    return content[:target] + block + content[target:]


BYTES: list[Mutation] = [flip_bits, cut, set_size, move_block]


def _position(content: bytes, draw: random.Random) -> int:
    size = len(content)
    near = draw.random()
    if near < 0.4:
        return draw.randrange(min(size, 3000))
    if near < 0.7:
        return max(0, size - 1 - draw.randrange(min(size, 3000)))
    return draw.randrange(size)


def nest(content: bytes, draw: random.Random) -> bytes:
    """Replace the end of a text by brackets that are nested 100,000 times."""
    at = draw.randrange(len(content))
    return content[:at] + draw.choice((b"[", b'{"a":')) * 100_000


def swap_value(value: Any, draw: random.Random, *, extra: tuple[Any, ...] = ()) -> Any:
    """Return a copy of nested dictionaries and lists with one value replaced, removed or renamed."""
    changed = _copy_containers(value)
    holders: list[tuple[Any, Any]] = []
    _collect(changed, holders)
    if not holders:
        return draw.choice((*_values(), *extra))
    holder, key = draw.choice(holders)
    action = draw.random()
    if action < 0.15:
        del holder[key]
    elif action < 0.3 and isinstance(holder, dict):
        holder[draw.choice(("", "\x1b[2J", "__class__", "0"))] = holder.pop(key)
    else:
        holder[key] = draw.choice((*_values(), *extra))
    return changed


def _copy_containers(value: Any) -> Any:
    """Copy dictionaries and lists, but not the tensors in them."""
    if isinstance(value, dict):
        return {key: _copy_containers(inner) for key, inner in value.items()}
    return [_copy_containers(inner) for inner in value] if isinstance(value, list) else value


def _values() -> tuple[Any, ...]:
    nested: Any = []
    for _ in range(60):
        nested = [nested]
    return (
        *(None, True, 0, -1, 1.5, 2**31, 2**63, -(2**70), 10**400, 10**9, float("nan"), float("inf")),
        *("", "x" * 5000, "\x1b[2J", "\u202e", "\x00", "../../etc/passwd", "/", "nan", "\ud800", "1e999"),
        *([], {}, [[]], {"": {}}, [10**9, 10**9], nested, "line\nbreak", "<script>alert(1)</script>"),
        *("http://localhost:1/", "file:///etc/passwd", "/etc/passwd", "/dev/zero", "local-dir:/etc"),
    )


def _collect(value: Any, holders: list[tuple[Any, Any]]) -> None:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            holders.append((value, key))
            _collect(inner, holders)


def swap_json(content: bytes, draw: random.Random) -> bytes:
    """Swap a value of a JSON file."""
    return json.dumps(swap_value(json.loads(content), draw)).encode("utf-8", "surrogatepass")


def swap_json_text(text: str, draw: random.Random) -> str:
    """Swap a value of a JSON text, or nest it."""
    if draw.random() < 0.1:
        return "[" * 100_000
    return json.dumps(swap_value(json.loads(text), draw))


def swap_header(content: bytes, draw: random.Random) -> bytes:
    """Swap a value in the header of a safetensors file, also in the JSON within its metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = header["__metadata__"]
    key = draw.choice([key for key in about if about[key][:1] in "[{"])
    if draw.random() < 0.6:
        about[key] = swap_json_text(about[key], draw)
    else:
        header = swap_value(header, draw)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def change_png_chunk(content: bytes, draw: random.Random) -> bytes:
    """Change, repeat or remove a chunk of a PNG, with the right checksum."""
    chunks = _read_png_chunks(content)
    at = draw.randrange(len(chunks))
    kind, data = chunks[at]
    action = draw.random()
    if action < 0.1:
        del chunks[at]
    elif action < 0.2:
        chunks.insert(draw.randrange(len(chunks) + 1), (kind, data))
    elif action < 0.3 or not data:
        chunks[at] = (draw.choice((b"tEXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"PLTE", b"tRNS")), data)
    elif kind in (b"IDAT", b"zTXt", b"iCCP") and action < 0.6:
        start = 0 if kind == b"IDAT" else data.index(b"\0") + 2
        pixels = draw.choice(BYTES)(zlib.decompress(data[start:]), draw)
        chunks[at] = (kind, data[:start] + zlib.compress(pixels, 1))
    else:
        chunks[at] = (kind, draw.choice(BYTES)(data, draw))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _read_png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks
