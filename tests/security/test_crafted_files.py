"""Crafted files, each of which once ended in a raw error, read outside a file, or filled the memory."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightspine
import lightspine_runtime
from lightspine.benchmark.results import load_results
from lightspine.data.class_mapping import load_class_mapping
from lightspine.data.shards import INDEX_SUFFIX, ShardSource, read_shard_index
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.classifiers import class_names
from lightspine.export.onnx_network import load_onnx
from lightspine.models.checkpoint import read_checkpoint
from lightspine.models.metadata import ModelMetadata, read_model_metadata
from lightspine.training.short_flags import expand_short_flags
from lightspine_runtime.scan_session import CannotSplitError, ScanSession
from support.checkpoints import save_small
from support.fuzz_formats import onnx_classifier, shard_bytes
from support.images import write_image
from support.training import SMALL_MODEL

DEEP = "[" * 100_000


def _deep_label(folder: Path) -> None:
    shard = folder / "deep.tar"
    shard.write_bytes(shard_bytes(label=b'{"label": ' + DEEP.encode()))
    read_shard_index(shard)


def _deep_text(folder: Path) -> Path:
    file = folder / "deep.index.json"
    file.write_text(DEEP)
    return file


def _deep_metadata(folder: Path) -> None:
    file = read_checkpoint(save_small(folder / "a.safetensors"))
    file.metadata["lightspine.run"] = DEEP
    read_model_metadata(file)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_class_mapping(_deep_text(folder)),
        lambda folder: load_results(_deep_text(folder)),
        lambda folder: read_checkpoint(_deep_text(folder)),
        _deep_label,
        _deep_metadata,
    ],
    ids=["class mapping", "results", "index of weights", "label", "metadata"],
)
def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(LightspineError, match="deep"):
        read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": np.array([-1, 5, 5])},
        {"sizes": np.array([10**9, 5, 5])},
        {"offsets": np.array([-512, 0, 0])},
        {"sizes": np.array([2**63 - 1, 5, 5]), "offsets": np.array([2**62, 0, 0])},
        {"offsets": np.zeros(2, np.int64)},
        {"offsets": np.zeros((3, 1), np.int64)},
        {"sizes": np.array(["a", "b", "c"])},
        {"name_ends": np.array([3, 1, 15])},
        {"name_ends": np.array([5, 10, 10**6])},
        {"name_data": np.full(15, 255, np.uint8)},
        {"label_ends": np.zeros(0, np.int64)},
    ],
    ids=lambda changes: " ".join(f"{key} {value}" for key, value in changes.items())[:40],
)
def test_index_of_somebody_else_is_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, np.ndarray]
) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(shard_bytes())
    expected = ShardSource(shard)
    index = shard.with_name(shard.name + INDEX_SUFFIX)
    with np.load(index) as saved:
        np.savez(index, **(dict(saved) | changes))
    source = ShardSource(shard)
    assert "rebuilding the damaged index" in caplog.text
    assert source.name(2) == expected.name(2)
    assert source.open(2).tobytes() == expected.open(2).tobytes()


def test_compressed_index_is_not_unpacked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(shard_bytes())
    read_shard_index(shard)
    index = shard.with_name(shard.name + INDEX_SUFFIX)
    with np.load(index) as saved:
        np.savez_compressed(index, **(dict(saved) | {"name_data": np.zeros(10**8, np.uint8)}))
    assert index.stat().st_size < 10**6
    read_shard_index(shard)
    assert "it claims more bytes than it has" in caplog.text


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a.safetensors", "/etc/passwd", "a\\b", "a\0b", "x" * 5000]
)
def test_index_of_weights_names_files_beside_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.index.json"
    file.write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(LightspineError, match="expected files in its own folder"):
        read_checkpoint(file)


def _save_config(folder: Path, **changes: Any) -> str:
    save_small(folder / "model.safetensors", classes=["a", "b", "c"])
    cfg = {"input_size": [3, 32, 32], "num_classes": 3} | changes.pop("pretrained_cfg", {})
    content = {"architecture": SMALL_MODEL, "num_classes": 3, "pretrained_cfg": cfg} | changes
    (folder / "config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path names another file"),
        ({"model_args": {"pretrained_cfg_overlay": {"url": "http://localhost:1"}}}, "names another file"),
        ({"model_args": {"num_classes": 10**9}}, "num_classes is beyond 65536"),
        ({"model_args": {"depths": [10**9, 1, 1]}}, "depths is beyond 1000"),
        ({"num_classes": 10**9}, "num_classes is beyond 65536"),
        ({"num_classes": "many"}, "describes a model that cannot be built"),
        ({"architecture": "local-dir:/etc"}, "stands for another model"),
        ({"model_args": {"stem_type": {}, "block_args": 7}}, "describes a model that cannot be built"),
        ({"pretrained_cfg": {"input_size": [3]}}, "describes a model that cannot be built"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configuration_of_somebody_else_is_checked(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LightspineError, match=message):
        lightspine.create_model(_save_config(tmp_path, **changes), pretrained=True)


def test_configuration_names_no_other_weights(tmp_path: Path) -> None:
    foreign = {"url": "http://localhost:1/a.pth", "hf_hub_filename": "../a.bin", "custom_load": True}
    model = lightspine.create_model(_save_config(tmp_path, pretrained_cfg=foreign), pretrained=True)
    expected = read_checkpoint(tmp_path / "model.safetensors").entries[""]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def _save_onnx(folder: Path, **changes: str) -> Path:
    model = onnx.load_model_from_string(onnx_classifier())
    for entry in model.metadata_props:
        entry.value = changes.get(entry.key.removeprefix("lightspine."), entry.value)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": '{"a": 1}'},
        {"class_names": "[1, 2, 3]"},
        {"class_names": DEEP},
        {"pixels": '"yes"'},
        {"preprocessing": "[]"},
        {"preprocessing": '{"input_size": [3, 1000000000, 1000000000]}'},
    ],
    ids=str,
)
def test_metadata_of_an_onnx_file_are_checked(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(lightspine_runtime.LightspineError, match="metadata"):
        lightspine_runtime.OnnxModel(_save_onnx(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"input_size": [3, 10**9, 10**9]},
        {"input_size": [3, 0, 32]},
        {"input_size": [3, 1e999, 32]},
        {"std": [0, 1, 1]},
        {"mean": [float("nan")] * 3},
        {"crop_pct": 1e-9},
    ],
    ids=str,
)
def test_preprocessing_out_of_range_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    good = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    with pytest.raises(lightspine_runtime.LightspineError, match="preprocessing metadata"):
        lightspine_runtime.OnnxModel(_save_onnx(tmp_path, preprocessing=json.dumps(good | changes)))
    file = read_checkpoint(save_small(tmp_path / "a.safetensors"))
    file.metadata["lightspine.preprocessing"] = json.dumps(good | changes)
    with pytest.raises(LightspineError, match="its preprocessing has the"):
        read_model_metadata(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "hf-hub:org/name"}, "stands for another model"),
        ({"kwargs": {"layers": [900] * 4}}, "describe more than .* layers"),
        ({"kwargs": {"cardinality": 0}}, "stores wrong model arguments"),
        ({"class_names": ["\ud800", "b", "c"]}, "not valid Unicode"),
        ({"class_names": ["a" * 2**24, "b", "c"]}, "its metadata have more than"),
        ({"preprocessing": {"mean": "123"}}, "its preprocessing has the mean"),
        ({"preprocessing": {"mean": [0.5] * 4}}, "its preprocessing has the mean"),
        ({"preprocessing": {"interpolation": "random"}}, "its preprocessing has the interpolation"),
        ({"preprocessing": {"input_size": [3, 4096, 4096], "crop_pct": 0.05}}, "has the crop_pct"),
        ({"run": {"data": 7}}, "its training run"),
        ({"run": {"data": {"val_fraction": 0.2}}}, "its training run"),
        ({"run": {"recipe": ["\x1b[2J"]}}, "its training run"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_of_a_checkpoint_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save_small(tmp_path / "a.safetensors", classes=["a", "b", "c"])
    strings = dict(read_checkpoint(path).metadata)
    strings |= {
        f"lightspine.{key}": value if isinstance(value, str) else json.dumps(value)
        for key, value in changes.items()
    }
    save_file(load_file(path), path, strings)
    with pytest.raises(LightspineError, match=message):
        lightspine.load_model(path)


def test_file_of_thousands_of_tensors_is_refused() -> None:
    nothing = torch.zeros(0)
    for tensors in ({str(i): nothing for i in range(20_001)}, {"module." * 80 + "weight": nothing}):
        with pytest.raises(LightspineError, match="expected up to 20,000 with names of up to 500"):
            lightspine.load_checkpoint(lightspine.create_model(SMALL_MODEL), tensors)


def test_tensors_of_8_bits_are_checked_for_nan() -> None:
    model = lightspine.create_model(SMALL_MODEL)
    tensors = {name: value.to(torch.float8_e5m2) for name, value in model.state_dict().items()}
    lightspine.load_checkpoint(model, tensors)
    tensors["conv1.0.weight"][:] = float("nan")
    with pytest.raises(LightspineError, match="holds NaN or infinity"):
        lightspine.load_checkpoint(model, tensors)


def test_first_convolution_of_another_rank_is_refused() -> None:
    model = lightspine.create_model(SMALL_MODEL)
    tensors = model.state_dict() | {"conv1.0.weight": torch.zeros(())}
    with pytest.raises(LightspineError, match=r"conv1\.0\.weight is a scalar in the file"):
        lightspine.load_checkpoint(model, tensors)


def test_another_number_of_class_names_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    write_image(image, (10, 20, 30), size=(40, 40))
    model = lightspine_runtime.OnnxModel(_save_onnx(tmp_path, class_names='["a"]'))
    with pytest.raises(lightspine_runtime.LightspineError, match="expected 3 class names"):
        model.predict([image])
    with pytest.raises(LightspineError, match="expected 3 class names in the weights of a, found 1"):
        class_names(ModelMetadata("a", class_names=["b"]), 3)


@pytest.mark.parametrize("location", ["../../../../../../etc/passwd", "/etc/passwd", "/dev/zero"])
def test_weights_of_an_onnx_file_outside_its_folder_are_not_read(tmp_path: Path, location: str) -> None:
    model = onnx.load_model_from_string(onnx_classifier())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="432")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LightspineError, match="ONNX Runtime cannot run"):
        load_onnx(tmp_path / "model.onnx")


def test_empty_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    with pytest.raises(lightspine_runtime.LightspineError, match="is empty"):
        lightspine_runtime.OnnxModel(tmp_path / "a.onnx")


@pytest.mark.parametrize("side", ["1e999", "1000000000", "0", "-5"])
def test_detection_settings_out_of_range_are_refused(tmp_path: Path, side: str) -> None:
    text = (
        f'{{"resize": [{side}, 800], "rounding": "down", "score_threshold": 0.5, "nms_threshold": 0.5, '
        '"detections_per_image": 100}'
    )
    with pytest.raises(lightspine_runtime.LightspineError, match="detection metadata"):
        lightspine_runtime.OnnxModel(_save_onnx(tmp_path, detection=text))


def test_logits_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (10, 20, 30), size=(40, 40))
    model = onnx.load_model_from_string(onnx_classifier())
    model.graph.node[-1].output[0] = "one"
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["one"], ["logits"], keepdims=0))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(lightspine_runtime.LightspineError, match="expected logits with 2 dimensions"):
        lightspine_runtime.OnnxModel(tmp_path / "model.onnx").predict([tmp_path / "a.png"])


def test_scan_without_an_output_is_no_raw_error(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(onnx_classifier())
    body, opset = [onnx.helper.make_node("Identity", ["x"], ["y"])], onnx.helper.make_opsetid("", 17)
    function = onnx.helper.make_function("lightspine", "GroupedScan", ["x"], ["y"], body, [opset])
    model.functions.append(function)
    model.opset_import.add(domain="lightspine", version=1)
    model.graph.node.insert(4, onnx.helper.make_node("GroupedScan", ["flat"], [], domain="lightspine"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CannotSplitError, match="its graph is damaged"):
        ScanSession(tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_extended_header_without_end_is_refused(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("././@Header")
    header.type, header.size = kind, 0
    (tmp_path / "a.tar").write_bytes(5000 * header.tobuf(tarfile.GNU_FORMAT) + shard_bytes())
    with pytest.raises(LightspineError, match="cannot read the shard"):
        read_shard_index(tmp_path / "a.tar")


def test_named_pipe_in_place_of_an_index_is_replaced(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(shard_bytes())
    os.mkfifo(shard.with_name(shard.name + INDEX_SUFFIX))
    assert len(read_shard_index(shard)) == 3
    assert shard.with_name(shard.name + INDEX_SUFFIX).is_file()


def test_operator_of_another_library_is_refused(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(onnx_classifier())
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.attack", "System"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LightspineError, match=r"com\.attack"):
        load_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: &a [*a]",
        "a: [",
        "\udcff",
        "2024-99-99",
        "a: &a [1, 1]\n"
        + "".join(
            f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *{'a' if not i else f'b{i - 1}'}]\n"
            for i in range(40)
        ),
    ],
    ids=["deep", "contains itself", "no YAML", "no UTF-8", "no date", "aliases"],
)
def test_recipe_with_short_flags_is_checked_before_it_is_loaded(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="expected a recipe"):
        expand_short_flags(["--config", str(recipe), "--epochs=1", "--size=64"])
