"""Read mutated files in child processes with limits: `python -m support.fuzzing FOLDER COUNT SEED FORMAT...`.

Prints a JSON object: format -> counts of files that were read and refused, and the failures.
"""

import argparse
import copy
import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

import lightspine
from lightspine.data.detection.coco_file import read_coco
from lightspine.data.shards import INDEX_SUFFIX, read_shard_index
from lightspine.errors import LightspineError
from lightspine.models.checkpoint import read_checkpoint, read_model_metadata
from lightspine.models.factory import identify_entry, load_model
from lightspine.training import cli
from lightspine.utils.image_files import open_image, read_image_size
from support.checkpoints import save_small
from support.images import write_image
from support.training import SMALL_MODEL

CASE_SECONDS = 10
MEMORY = 3 * 2**30
"""Address space of a child in bytes, in addition to that of the imported libraries."""

# The file appears if code of a mutated file runs; set in `main`.
CANARY = "CANARY"
# Whether files are also compared with all models, in runs of at least so many cases.
IDENTIFY = False
LONG_RUN = 1000

Mutation = Callable[[bytes, random.Random], bytes]


class TooLongError(BaseException):
    """A case took longer than `CASE_SECONDS`."""


class Attack:
    """An object whose pickle runs a command when it is loaded without restrictions."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


@dataclass
class Format:
    """A file format under test.

    Attributes:
        seed: content of a valid file.
        suffix: suffix of the file.
        read: reads the file.
        mutations: mutations to draw from.
    """

    seed: bytes
    suffix: str
    read: Callable[[Path], Any]
    mutations: list[Mutation]


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
    value = draw.choice((0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)) % 2 ** (
        8 * width
    )
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


def swap_value(value: Any, draw: random.Random, *, extra: tuple[Any, ...] = ()) -> Any:
    """Return a copy of nested dictionaries and lists with one value replaced, removed or renamed."""
    changed = copy.deepcopy(value)
    holders: list[tuple[Any, Any]] = []
    _collect(changed, holders)
    holder, key = draw.choice(holders)
    action = draw.random()
    if action < 0.15:
        del holder[key]
    elif action < 0.3 and isinstance(holder, dict):
        holder[draw.choice(("", "\x1b[2J", "__class__", "0"))] = holder.pop(key)
    else:
        holder[key] = draw.choice((*_values(), *extra))
    return changed


def _values() -> tuple[Any, ...]:
    nested: Any = []
    for _ in range(60):
        nested = [nested]
    return (
        *(None, True, 0, -1, 1.5, 2**31, 2**63, -(2**70), 10**400, 10**9, float("nan"), float("inf")),
        *("", "x" * 5000, "\x1b[2J", "\u202e", "\x00", "../../etc/passwd", "/", "nan", "\ud800", "1e999"),
        *([], {}, [[]], {"": {}}, [10**9, 10**9], nested),
    )


def _collect(value: Any, holders: list[tuple[Any, Any]]) -> None:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            holders.append((value, key))
            _collect(inner, holders)


def _position(content: bytes, draw: random.Random) -> int:
    size = len(content)
    near = draw.random()
    if near < 0.4:
        return draw.randrange(min(size, 3000))
    if near < 0.7:
        return max(0, size - 1 - draw.randrange(min(size, 3000)))
    return draw.randrange(size)


def _swap_json(content: bytes, draw: random.Random) -> bytes:
    return json.dumps(swap_value(json.loads(content), draw)).encode("utf-8", "surrogatepass")


def _swap_header(content: bytes, draw: random.Random) -> bytes:
    """Swap a value in the header of a safetensors file, also in the JSON within its metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = header["__metadata__"]
    key = draw.choice([key for key in about if about[key][:1] in "[{"])
    if draw.random() < 0.6:
        about[key] = json.dumps(swap_value(json.loads(about[key]), draw))
    else:
        header = swap_value(header, draw)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _swap_yaml(content: bytes, draw: random.Random) -> bytes:
    attacks = (
        {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {CANARY}", "shell": True}},
        {"class_path": "os.system", "init_args": {"command": f"touch {CANARY}"}},
        "http://localhost:1/",
    )
    text: str = yaml.safe_dump(swap_value(yaml.safe_load(content), draw, extra=3 * attacks), sort_keys=False)
    if draw.random() < 0.1:
        text = text.replace("seed", "!!python/object/apply:os.system ['touch " + CANARY + "']\nseed", 1)
    return text.encode("utf-8", "surrogatepass")


def _swap_pickled(*, legacy: bool) -> Mutation:
    def swap(content: bytes, draw: random.Random) -> bytes:  # noqa: ARG001
        extra = (
            *(Attack(), os.system, argparse.Namespace(a=1), torch.zeros(2).to_sparse(), torch.zeros(())),
            *(torch.zeros(1).expand(10**6, 10**6), np.zeros(2), {1: torch.ones(1)}, b"bytes"),
            *(
                torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
                torch.ones(2, dtype=torch.cfloat),
            ),
        )
        return _pickled(swap_value(_content(), draw, extra=extra), legacy=legacy)

    return swap


def _content() -> dict[str, Any]:
    torch.manual_seed(0)
    model = lightspine.create_model(SMALL_MODEL, num_classes=3)
    about = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "meta": {"CLASSES": ["a", "b", "c"]}}
    return {"state_dict": dict(model.state_dict()), **about}


def _pickled(content: Any, *, legacy: bool) -> bytes:
    with tempfile.TemporaryFile() as file:
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        file.seek(0)
        return file.read()


def _picture(kind: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    with tempfile.TemporaryFile() as file:
        Image.fromarray(pixels).save(file, kind, **options)
        file.seek(0)
        return file.read()


def _coco(images: Path) -> bytes:
    for number in (1, 2):
        write_image(images / f"{number}.png", (10, 20, 30), size=(60, 50))
    box = {"category_id": 7, "iscrowd": 0, "area": 400.0, "bbox": [10.0, 10.0, 20.0, 20.0]}
    polygon = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
    runs = {"size": [50, 60], "counts": [500, 20, 30, 20, 2430]}
    content = {
        "info": {"year": 2024},
        "images": [{"id": i, "file_name": f"{i}.png", "height": 50, "width": 60} for i in (1, 2)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "segmentation": polygon} | box,
            {"id": 2, "image_id": 2, "segmentation": runs} | box | {"category_id": 9, "iscrowd": 1},
            {"id": 3, "image_id": 2, "segmentation": polygon} | box,
        ],
    }
    return json.dumps(content).encode()


def _shard() -> bytes:
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number in range(3):
                for suffix, data in ((".png", _picture("PNG")), (".cls", b"1"), (".json", b'{"label": 2}')):
                    member = tarfile.TarInfo(f"{number}{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        file.seek(0)
        return file.read()


def _read_shard(path: Path) -> None:
    # Not the index of the case before.
    path.with_name(path.name + INDEX_SUFFIX).unlink(missing_ok=True)
    read_shard_index(path)


def _read_model(path: Path) -> None:
    file = read_checkpoint(path)
    read_model_metadata(file)
    # Comparing the tensors with those of every model takes ten times as long as the rest.
    if IDENTIFY and zlib.crc32(path.read_bytes()) % 8 == 0:
        for entry in file.entries:
            identify_entry(file, entry)
    if path.suffix == ".safetensors":
        load_model(path)
    else:
        lightspine.create_model(SMALL_MODEL, num_classes=3, checkpoint=path)


def _read_picture(path: Path) -> None:
    # It reads less of the file than `open_image`, which decides.
    with suppress(LightspineError):
        read_image_size(path)
    open_image(path)


def _read_recipe(path: Path) -> None:
    folder = path.parent / "run"
    cli.main(["--config", str(path), "--folder", str(folder), "--trainer.enable_progress_bar=false"])


def _formats(folder: Path) -> dict[str, Callable[[], Format]]:
    images = folder / "images"

    def recipe() -> Format:
        # Only the recipe is under test: the objects are created, and nothing is trained.
        cli.run_training = lambda *_, **__: None  # type: ignore[assignment]
        text = {
            "seed": 0,
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "gradient_clip_val": 1.0, "callbacks": []},
            "model": {
                "class_path": "ClassificationTask",
                "init_args": {
                    "model": SMALL_MODEL,
                    "num_classes": 10,
                    "lr": 0.001,
                    "warmup_epochs": 1,
                    "model_args": {"drop_rate": 0.1},
                },
            },
            "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 32}},
        }
        return Format(yaml.safe_dump(text).encode(), ".yaml", _read_recipe, [*BYTES, *3 * [_swap_yaml]])

    def pickled(legacy: bool) -> Format:
        swap = _swap_pickled(legacy=legacy)
        return Format(_pickled(_content(), legacy=legacy), ".pth", _read_model, [*BYTES, *2 * [swap]])

    def safetensors() -> Format:
        path = save_small(folder / "seed.safetensors", classes=["a", "b", "c"])
        return Format(path.read_bytes(), ".safetensors", _read_model, [*BYTES, *4 * [_swap_header]])

    def coco() -> Format:
        return Format(
            _coco(images), ".json", lambda path: read_coco(path, images), [*BYTES, *8 * [_swap_json]]
        )

    def shard() -> Format:
        return Format(_shard(), ".tar", _read_shard, BYTES)

    return {
        "safetensors": safetensors,
        "pth": lambda: pickled(legacy=False),
        "pth-legacy": lambda: pickled(legacy=True),
        "recipe": recipe,
        "coco": coco,
        "png": lambda: Format(_picture("PNG"), ".png", _read_picture, BYTES),
        "jpeg": lambda: Format(_picture("JPEG", exif=b"Exif\x00\x00II*\x00"), ".jpg", _read_picture, BYTES),
        "shard": shard,
    }


def _limit(count: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (60 + 5 * count, 60 + 5 * count))


def _stop(*_: Any) -> None:
    raise TooLongError


def _run_format(name: str, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Read `count` mutated files; the number of the present one is in the file `case`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    form = _formats(folder)[name]()
    form.read(_write(folder / f"valid{form.suffix}", form.seed))
    _limit(count)
    signal.signal(signal.SIGALRM, _stop)
    outcome: dict[str, Any] = {"read": 0, "refused": 0, "failures": []}
    started = time.monotonic()
    for case in range(count):
        (folder / "case").write_text(f"case {case}")
        draw = random.Random(f"{name} {seed} {case}")
        file = _write(folder / f"case{form.suffix}", draw.choice(form.mutations)(form.seed, draw))
        signal.alarm(CASE_SECONDS)
        try:
            form.read(file)
            outcome["read"] += 1
        except LightspineError:
            outcome["refused"] += 1
        except BaseException as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != "_stop"]
            where = frames[-1]
            text = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
            outcome["failures"].append({"case": case, "error": text})
        finally:
            signal.alarm(0)
    return outcome | {"seconds": round(time.monotonic() - started, 1)}


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _run_in_child(name: str, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Fork, because importing PyTorch takes longer than the cases."""
    folder.mkdir()
    pid = os.fork()
    if not pid:
        with (folder / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            outcome = _run_format(name, folder, count, seed)
        except BaseException:
            outcome = {"failures": [{"error": traceback.format_exc()}]}
        (folder / "outcome.json").write_text(json.dumps(outcome))
        os._exit(0)
    deadline = time.monotonic() + 60 + 5 * count
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    file = folder / "outcome.json"
    if file.is_file():
        return json.loads(file.read_text())
    at = (folder / "case").read_text() if (folder / "case").is_file() else "before the first case"
    return {"failures": [{"error": f"the process died, {at}"}]}


def main() -> None:
    """Run the formats named on the command line."""
    global CANARY, IDENTIFY
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    CANARY = str(folder / "canary")
    IDENTIFY = count >= LONG_RUN
    # The first comparison builds every model, which takes seconds.
    identify_entry(read_checkpoint({"weight": torch.zeros(1)}), "")
    outcomes = {name: _run_in_child(name, folder / name, count, seed) for name in sys.argv[4:]}
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main()
