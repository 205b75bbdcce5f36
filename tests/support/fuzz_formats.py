"""File formats under test: valid files of each, what reads them, and how they are mutated."""

import argparse
import io
import json
import logging
import os
import random
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from onnx import helper
from PIL import Image, PngImagePlugin, features

import lightspine
import lightspine_runtime
from lightspine.benchmark.report import write_report
from lightspine.benchmark.results import load_results, save_results
from lightspine.data.class_mapping import load_class_mapping
from lightspine.data.detection.coco_file import read_coco
from lightspine.data.image_list import split_image_list
from lightspine.data.segmentation.label_maps import LabelReader
from lightspine.data.shards import INDEX_SUFFIX, ShardSource, read_shard_index
from lightspine.errors import LightspineError
from lightspine.export.metadata import ExportMetadata
from lightspine.export.onnx_network import load_onnx
from lightspine.models.checkpoint import read_checkpoint
from lightspine.models.factory import identify_entry, load_model
from lightspine.models.metadata import read_model_metadata
from lightspine.training import cli
from lightspine.utils.image_files import find_nvjpeg_size, open_image, read_image_size
from support.bench_results import a_result, a_row
from support.checkpoints import save_small
from support.fuzz_mutations import (
    BYTES,
    Mutation,
    change_png_chunk,
    nest,
    swap_header,
    swap_json,
    swap_json_text,
    swap_value,
)
from support.images import write_image
from support.training import SMALL_MODEL

REFUSALS = (LightspineError, lightspine_runtime.LightspineError)
"""Exceptions whose message is the one sentence that a user sees."""


@dataclass
class Format:
    """A file format under test.

    Attributes:
        seeds: contents of valid files.
        name: name of the file that is read.
        read: reads the file.
        mutations: mutations to draw from.
    """

    seeds: list[bytes]
    name: str
    read: Callable[[Path], Any]
    mutations: list[Mutation]


class Attack:
    """An object whose pickle runs a command when it is loaded without restrictions."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def formats(folder: Path, *, canary: Path, identify: bool) -> dict[str, Callable[[], Format]]:
    """Return a function per format that makes its valid files in a folder.

    Args:
        folder: folder of the files.
        canary: file that commands planted in the mutated files create.
        identify: whether one checkpoint in eight is compared with all models, which takes ten times as
            long as the rest.
    """
    return {
        "safetensors": lambda: _safetensors(folder, identify),
        "pth": lambda: _pickled_format(canary, identify, legacy=False),
        "pth-legacy": lambda: _pickled_format(canary, identify, legacy=True),
        "weights-index": lambda: _weights_index(folder),
        "local-dir": lambda: _local_dir(folder),
        "onnx": lambda: _onnx(folder),
        "recipe": lambda: _recipe(canary),
        "coco": lambda: Format(
            [_coco(folder)], "case.json", partial(_read_coco, folder), [*BYTES, nest, *8 * [swap_json]]
        ),
        "class-mapping": lambda: Format(
            [b'{"n01440764": 0, "n01443537": 1}', b'{"1.JPEG": [65], "2.JPEG": []}', b"[[], [970, 795]]"],
            "case.json",
            load_class_mapping,
            [*BYTES, nest, *4 * [swap_json]],
        ),
        "image-list": lambda: _image_list(folder),
        "results": lambda: _results(folder),
        "png": lambda: Format(_pngs(), "case.png", _read_picture, [*BYTES, *6 * [change_png_chunk]]),
        "jpeg": lambda: Format([_picture("JPEG", exif=_exif(), icc_profile=_profile())], *_IMAGE),
        "images": lambda: Format(_images(), *_IMAGE),
        "label-map": lambda: Format(
            [_palette_png()], "case.png", LabelReader(3).read, [*BYTES, *6 * [change_png_chunk]]
        ),
        "shard": lambda: Format([shard_bytes()], "case.tar", _read_shard, BYTES),
        "index": lambda: _index(folder),
    }


def _exif() -> bytes:
    exif = Image.Exif()
    exif[274], exif[270], exif[305] = 6, "a \x1b[2J description", "<script>alert(1)</script>"
    return exif.tobytes()


@cache
def _profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _pixels() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))


def _picture(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or _pixels()).save(file, kind, **options)
    return file.getvalue()


def _pngs() -> list[bytes]:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a title")
    text.add_text("Comment", "x" * 500, zip=True)
    frames = [_pixels().rotate(90 * turn) for turn in (1, 2)]
    gray = Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(48, 40))
    return [
        _picture("PNG"),
        _picture("PNG", pnginfo=text, exif=_exif(), icc_profile=_profile()),
        _picture("PNG", save_all=True, append_images=frames),
        _picture("PNG", _pixels().quantize(16), transparency=3),
        _picture("PNG", gray),
    ]


def _images() -> list[bytes]:
    frames = [_pixels().rotate(90 * turn) for turn in (1, 2)]
    found = [
        _picture("BMP"),
        _picture("PPM"),
        _picture("PPM", _pixels().convert("L")),
        _picture("GIF", _pixels().quantize(16), save_all=True, append_images=frames),
        _picture("TIFF", save_all=True, append_images=frames, exif=_exif()),
        *(_picture("TIFF", compression=kind) for kind in ("tiff_lzw", "packbits", "tiff_adobe_deflate")),
    ]
    for kind, feature in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000")):
        if features.check(feature):
            found.append(_picture(kind))
    return found


def _palette_png() -> bytes:
    image = Image.fromarray((np.arange(40 * 48).reshape(40, 48) % 3).astype(np.uint8)).convert("P")
    return _picture("PNG", image)


def _read_picture(path: Path) -> None:
    # It reads less of the file than `open_image`, which decides.
    with suppress(LightspineError):
        read_image_size(path)
    with suppress(LightspineError):
        find_nvjpeg_size(path.read_bytes(), str(path))
    open_image(path)
    lightspine_runtime.images.open_image(path)


_IMAGE = ("case.jpg", _read_picture, BYTES)


def _safetensors(folder: Path, identify: bool) -> Format:
    path = save_small(folder / "seed.safetensors", classes=["a", "b", "c"])
    read = partial(_read_model, identify)
    return Format([path.read_bytes()], "case.safetensors", read, [*BYTES, *4 * [swap_header]])


def _pickled_format(canary: Path, identify: bool, *, legacy: bool) -> Format:
    read = partial(_read_model, identify)
    extra = (
        *(Attack(canary), os.system, argparse.Namespace(a=1), torch.zeros(2).to_sparse(), torch.zeros(())),
        *(torch.zeros(1).expand(10**6, 10**6), np.zeros(2), {1: torch.ones(1)}, b"bytes"),
        *(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.ones(2, dtype=torch.cfloat)),
    )

    def swap(content: bytes, draw: random.Random) -> bytes:  # noqa: ARG001
        return _pickled(swap_value(_content(), draw, extra=extra), legacy=legacy)

    return Format([_pickled(_content(), legacy=legacy)], "case.pth", read, [*BYTES, *2 * [swap]])


@cache
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


def _read_model(identify: bool, path: Path) -> None:
    file = read_checkpoint(path)
    read_model_metadata(file)
    if identify and zlib.crc32(path.read_bytes()) % 8 == 0:
        for entry in file.entries:
            identify_entry(file, entry)
    if path.suffix == ".safetensors":
        load_model(path, name=None if identify else SMALL_MODEL)
    else:
        lightspine.create_model(SMALL_MODEL, num_classes=3, checkpoint=path)


def _weights_index(folder: Path) -> Format:
    path = save_small(folder / "weights.safetensors", classes=["a", "b", "c"])
    names = list(read_checkpoint(path).entries[""])
    content = {"metadata": {"total_size": 10}, "weight_map": dict.fromkeys(names[:5], path.name)}

    def read(case: Path) -> None:
        lightspine.create_model(SMALL_MODEL, num_classes=3, checkpoint=case)

    return Format([json.dumps(content).encode()], "case.index.json", read, [*BYTES, nest, *8 * [swap_json]])


def _local_dir(folder: Path) -> Format:
    place = folder / "local"
    place.mkdir(exist_ok=True)
    save_small(place / "model.safetensors", classes=["a", "b", "c"])
    content = {
        "architecture": SMALL_MODEL,
        "num_classes": 3,
        "num_features": 96,
        "global_pool": "avg",
        "model_args": {"drop_rate": 0.1},
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": {
            "tag": "in1k",
            "input_size": [3, 32, 32],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 3,
            "pool_size": [1, 1],
            "first_conv": "stem.conv1",
            "classifier": "fc",
        },
    }

    def read(case: Path) -> None:
        (place / "config.json").write_bytes(case.read_bytes())
        lightspine.create_model(f"local-dir:{place}", pretrained=True)

    return Format([json.dumps(content).encode()], "case.json", read, [*BYTES, nest, *8 * [swap_json]])


def _onnx(folder: Path) -> Format:
    image = folder / "image.png"
    _pixels().save(image)
    image_values = np.zeros((1, 3, 32, 32), dtype=np.float32)

    def read(case: Path) -> None:
        network, _ = load_onnx(case, threads=1)
        with suppress(LightspineError):
            network(torch.from_numpy(image_values))
        lightspine_runtime.OnnxModel(case, threads=1).predict([image])

    return Format([onnx_classifier()], "case.onnx", read, [*BYTES, *6 * [_swap_onnx]])


def onnx_classifier() -> bytes:
    """Return a small classifier with the metadata of an exported file."""
    draw = np.random.default_rng(0)
    weights = {"conv": (4, 3, 3, 3), "fc": (3, 4)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "conv"], ["maps"], strides=[2, 2]),
            helper.make_node("Relu", ["maps"], ["active"]),
            helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "fc"], ["logits"], transB=1),
        ],
        "classifier",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])],
        [
            onnx.numpy_helper.from_array(draw.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    about = ExportMetadata(
        name=SMALL_MODEL,
        kind="classifier",
        class_names=["a", "b", "c"],
        preprocessing={
            "input_size": [3, 32, 32],
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "crop_pct": 0.9,
            "crop_mode": "center",
        },
        checkpoint={"lightspine.kwargs": "{}", "lightspine.run": '{"recipe": "a", "seed": 1}'},
    )
    helper.set_model_props(model, about.entries())
    return model.SerializeToString()


def _swap_onnx(content: bytes, draw: random.Random) -> bytes:
    """Change the metadata or the graph of an ONNX file."""
    model = onnx.load_model_from_string(content)
    if draw.random() < 0.6:
        entry = draw.choice(model.metadata_props)
        if draw.random() < 0.6 and entry.value[:1] in ("[", "{"):
            # Protobuf has no surrogates.
            entry.value = swap_json_text(entry.value, draw).encode("utf-8", "replace").decode()
        else:
            entry.value = draw.choice(
                ("", "{", "\x1b[2J", "true", "9" * 5000, "x" * 5000, "null", "[" * 100_000)
            )
        return model.SerializeToString()
    node, tensor = draw.choice(model.graph.node), draw.choice(model.graph.initializer)
    action = draw.randrange(6)
    if action == 0:
        node.domain, node.op_type = draw.choice(
            (("com.attack", "System"), ("ai.onnx.ml", "Scaler"), ("", "Loop"))
        )
    elif action == 1:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", draw.choice(_OUTSIDE)), ("offset", "0"), ("length", "432")):
            tensor.external_data.add(key=key, value=value)
    elif action == 2:
        tensor.dims[0] = draw.choice((0, -1, 2**31, 2**62))
    elif action == 3:
        node.input[0] = draw.choice((*node.output, "nothing", ""))
    elif action == 4:
        model.graph.input[0].type.tensor_type.shape.dim[draw.randrange(4)].dim_value = draw.choice(
            (0, -1, 7, 2**40)
        )
    else:
        model.opset_import[0].version = draw.choice((0, -1, 1, 2**40))
    return model.SerializeToString()


_OUTSIDE = ("../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "", "absent", "\x00")


def _recipe(canary: Path) -> Format:
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
    attacks = (
        {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {canary}", "shell": True}},
        {"class_path": "os.system", "init_args": {"command": f"touch {canary}"}},
        "http://localhost:1/",
    )

    def swap(content: bytes, draw: random.Random) -> bytes:
        changed = swap_value(yaml.safe_load(content), draw, extra=3 * attacks)
        found: str = yaml.safe_dump(changed, sort_keys=False)
        if draw.random() < 0.1:
            found = found.replace("seed", f"!!python/object/apply:os.system ['touch {canary}']\nseed", 1)
        return found.encode("utf-8", "surrogatepass")

    return Format([yaml.safe_dump(text).encode()], "case.yaml", _read_recipe, [*BYTES, nest, *4 * [swap]])


def _read_recipe(path: Path) -> None:
    folder = path.parent / "run"
    cli.main(["--config", str(path), "--folder", str(folder), "--trainer.enable_progress_bar=false"])


def _coco(folder: Path) -> bytes:
    for number in (1, 2):
        write_image(folder / "images" / f"{number}.png", (10, 20, 30), size=(60, 50))
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


def _read_coco(folder: Path, path: Path) -> None:
    read_coco(path, folder / "images")


def _image_list(folder: Path) -> Format:
    rows = [
        f"images/{number % 2 + 1}.png,{'ab'[number % 2]},{'train' if number < 4 else 'val'}"
        for number in range(6)
    ]
    for number in (1, 2):
        write_image(folder / "images" / f"{number}.png", (10, 20, 30), size=(60, 50))
    return Format(["\n".join(["path,label,split", *rows]).encode()], "case.csv", split_image_list, BYTES)


def _results(folder: Path) -> Format:
    rows = [a_row("shvit_s1"), a_row("vim_tiny")]
    save_results(a_result(rows), folder / "results")

    def read(case: Path) -> None:
        load_results(case)
        # Drawing the charts takes a hundred times as long as reading.
        if zlib.crc32(case.read_bytes()) % 64 == 0:
            page = write_report([case], folder / "report").page
            assert "<script>alert(1)" not in page.read_text(encoding="utf-8")

    content = (folder / "results" / "results.json").read_bytes()
    return Format([content], "case.json", read, [*BYTES, nest, *8 * [swap_json]])


def shard_bytes(label: bytes = b'{"label": 2}') -> bytes:
    """Return a shard of three images, with a link and a device beside them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(3):
            for suffix, data in ((".png", _picture("PNG")), (".cls", b"1"), (".json", label)):
                member = tarfile.TarInfo(f"{number}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "3.png"), (tarfile.CHRTYPE, "4.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    return file.getvalue()


def _read_shard(path: Path) -> None:
    # Not the index of the case before.
    path.with_name(path.name + INDEX_SUFFIX).unlink(missing_ok=True)
    read_shard_index(path)


def _index(folder: Path) -> Format:
    shard = folder / "seed.tar"
    shard.write_bytes(shard_bytes())
    index = shard.with_name(shard.name + INDEX_SUFFIX)
    read_shard_index(shard)
    content = index.read_bytes()

    def read(case: Path) -> None:
        index.write_bytes(case.read_bytes())
        rebuilt = _Warnings()
        log = logging.getLogger("lightspine.data.shards")
        log.addHandler(rebuilt)
        try:
            source = ShardSource(shard)
        finally:
            log.removeHandler(rebuilt)
        source.written_labels()
        for position in range(len(source)):
            source.open(position)
        if rebuilt.count:
            raise LightspineError("the index was damaged and has been made again")

    return Format([content], "case.npz", read, [*BYTES, *6 * [_swap_array]])


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        self.count += 1


def _swap_array(content: bytes, draw: random.Random) -> bytes:
    """Replace an array of an index file, or values in it."""
    with np.load(io.BytesIO(content)) as saved:
        arrays = {name: saved[name] for name in saved.files}
    name = draw.choice([name for name in arrays if name != "stamp"])
    array = arrays[name].copy()
    action = draw.random()
    if action < 0.5 and array.size:
        values = [-1, 0, 1, 2**31, 2**62, -(2**62), 255]
        with warnings.catch_warnings():
            array.reshape(-1)[draw.randrange(array.size)] = np.array(draw.choice(values)).astype(array.dtype)
    elif action < 0.9:
        others = (
            array[:-1],
            array[None],
            array.astype(np.float64),
            array.astype("U8"),
            np.zeros(()),
            array[:0],
        )
        array = draw.choice(others)
    else:
        del arrays[name]
        name, array = "other", array
    arrays[name] = array
    file = io.BytesIO()
    draw.choice((np.savez, np.savez_compressed))(file, **arrays)
    return file.getvalue()
