"""Evaluation and prediction with an exported ONNX file, as with its checkpoint."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image

import lightspine
from lightspine.data.segmentation import scan_segmentation_folder
from lightspine.data.transforms import Preprocessing
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import (
    InferenceOptions,
    evaluate,
    evaluate_segmenter,
    predict,
    predict_dense,
    predict_images,
)
from lightspine.export import export_onnx
from lightspine.export.metadata import ExportMetadata
from lightspine.models.checkpoint import read_checkpoint
from lightspine_cli.main import main
from support.checkpoints import save_small
from support.coco import unpack
from support.dense_files import PREPROCESSING, segmenter_file
from support.images import COLOURS, write_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its exports and images."""
    folder = tmp_path_factory.mktemp("onnx")
    save_small(folder / "model.safetensors", classes=list(COLOURS))
    model, saved = lightspine.load_model(folder / "model.safetensors")
    export_onnx(
        model,
        folder / "model.onnx",
        shapes=[(1, 32, 32)],
        class_names=saved.class_names,
        preprocessing=saved.preprocessing,
    )
    write_folder(folder / "images", count=3)
    return folder


def test_scores_are_those_of_the_checkpoint(place: Path) -> None:
    exported, own = (evaluate(place / name, place / "images") for name in ("model.onnx", "model.safetensors"))
    assert exported["top1"] == own["top1"]
    assert exported["confusion"] == own["confusion"]
    assert exported["loss"] == pytest.approx(own["loss"], abs=1e-4)
    assert exported["parameters"] is None


def test_predictions_are_those_of_the_checkpoint(place: Path) -> None:
    images = sorted((place / "images").rglob("*.jpg"))
    exported, own = (predict(place / name, images) for name in ("model.onnx", "model.safetensors"))
    for ours, theirs in zip(exported, own, strict=True):
        assert [score.name for score in ours.classes] == [score.name for score in theirs.classes]
        assert ours.classes[0].probability == pytest.approx(theirs.classes[0].probability, abs=1e-5)


def test_choice_of_weights_is_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="expected weights='auto' for the exported file"):
        evaluate(place / "model.onnx", place / "images", weights="ema")


def test_other_device_than_the_cpu_is_refused(place: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the exported file .*model\.onnx runs on the CPU in float32 only, got meta"
    ):
        predict(place / "model.onnx", [], device="meta")


def test_runs_over_a_folder_refuse_another_device_too(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs on the CPU in float32 only, got meta"):
        predict_images(
            place / "model.onnx", place / "images", tmp_path / "out", options=InferenceOptions(device="meta")
        )


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
@pytest.mark.parametrize("option", [[], ["--checkpoint"]], ids=["first", "named"])
def test_commands_take_a_file(
    name: str, option: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, file = str(next((place / "images").rglob("*.jpg"))), str(place / name)
    assert main(["predict", *option, file, image, "--json"]) == 0
    assert [found["image"] for found in json.loads(capsys.readouterr().out)] == [image]
    assert main(["evaluate", *option, file, "--data", str(place / "images"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9


def test_predict_takes_a_file_for_a_whole_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(place / "model.onnx"), "--data", str(place / "images"), "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 9


def foreign_file(folder: Path) -> Path:
    """Write an ONNX file that lightspine did not export."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / "foreign.onnx")
    return folder / "foreign.onnx"


def damaged_file(place: Path, folder: Path) -> Path:
    """Write the first half of a file."""
    content = (place / "model.onnx").read_bytes()
    (folder / "half.onnx").write_bytes(content[: len(content) // 2])
    return folder / "half.onnx"


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("kind", "message", "status"),
    [
        ("foreign", "expected a file that `lightspine export` wrote", 2),
        ("damaged", "ONNX Runtime cannot run ", 1),
        ("absent", "gone.onnx does not exist", 2),
    ],
)
def test_file_that_cannot_be_used_is_one_sentence(
    command: str,
    kind: str,
    message: str,
    status: int,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"foreign": foreign_file(tmp_path), "damaged": damaged_file(place, tmp_path)}
    file = str(files.get(kind, tmp_path / "gone.onnx"))
    image = str(next((place / "images").rglob("*.jpg")))
    rest = [image] if command == "predict" else ["--data", str(place / "images")]
    assert main([command, file, *rest]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "a.png"], "expected a checkpoint: "),
        (
            ["predict", "m.onnx", "a.png", "--checkpoint", "n.onnx"],
            "expected one checkpoint, got m.onnx and ",
        ),
        (["evaluate", "--data", "digits"], "expected a checkpoint: "),
        (["evaluate", "m.onnx", "--checkpoint", "n.onnx", "--data", "digits"], "expected one checkpoint"),
        (
            ["evaluate", "images", "--checkpoint", "n.onnx", "--data", "digits"],
            "expected a checkpoint as the",
        ),
    ],
)
def test_wrong_number_of_checkpoints_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


BRIGHTEST_CHANNEL = """
<ir_version: 10, opset_import: ["": 20]>
network (uint8[batch, height, width, 3] pixels) => (int64[batch, height, width] classes)
{ classes = ArgMax<axis=3, keepdims=0>(numbers) numbers = Cast<to=1>(pixels) }
"""
CLASSES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def class_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported segmenter from pixels to classes: the brightest channel."""
    folder = tmp_path_factory.mktemp("classes")
    checkpoint = read_checkpoint(segmenter_file(folder / "segmenter.safetensors", CLASSES))
    entries = ExportMetadata(
        name="test_efficientnet",
        kind="segmenter",
        class_names=CLASSES,
        preprocessing=Preprocessing.from_config(PREPROCESSING).to_dict(),
        pixels=True,
        checkpoint=checkpoint.metadata,
    ).entries()
    model = onnx.parser.parse_model(BRIGHTEST_CHANNEL)
    model.graph.node.insert(0, model.graph.node.pop())
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, folder / "classes.onnx")
    return folder / "classes.onnx"


def write_noise(path: Path, height: int, width: int) -> np.ndarray:
    """Write an image of random pixels; returns the brightest channel of each pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels.argmax(-1).astype(np.uint8)


def test_class_map_is_predicted_at_the_size_of_the_image(class_map: Path, tmp_path: Path) -> None:
    expected = write_noise(tmp_path / "a.png", 65, 97)
    [found] = predict_dense(class_map, [tmp_path / "a.png"], out=tmp_path / "out", labels=True, own_size=True)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "a_labels.png")), expected)
    assert found.shares is not None
    assert found.shares["red"] == pytest.approx((expected == 0).mean())


def test_class_map_of_an_image_resized_as_for_the_checkpoint_has_the_size_of_the_image(
    class_map: Path, tmp_path: Path
) -> None:
    write_noise(tmp_path / "a.png", 130, 194)
    predict_dense(class_map, [tmp_path / "a.png"], out=tmp_path / "out", labels=True)
    assert np.asarray(Image.open(tmp_path / "out" / "a_labels.png")).shape == (130, 194)


def test_class_map_is_evaluated(class_map: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        labels = write_noise(tmp_path / "images" / split / "a.png", 64, 96)
        (tmp_path / "masks" / split).mkdir(parents=True)
        Image.fromarray(labels).save(tmp_path / "masks" / split / "a.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    report = evaluate_segmenter(class_map, tmp_path)
    assert report["settings"]["scale"] == [96, 64]
    assert report["scores"]["mIoU"] == 100


def test_class_without_a_name_is_refused(class_map: Path, tmp_path: Path) -> None:
    model = onnx.load(class_map)
    model.graph.node[-1].output[0] = "numbers_of_channels"
    model.graph.node.append(
        onnx.helper.make_node("Add", ["numbers_of_channels", "numbers_of_channels"], ["classes"])
    )
    onnx.save(model, tmp_path / "classes.onnx")
    write_noise(tmp_path / "a.png", 65, 97)
    with pytest.raises(
        LightspineError, match=r"expected classes from 0 to 2 from .*classes\.onnx, got 0 to 4"
    ):
        predict_dense(tmp_path / "classes.onnx", [tmp_path / "a.png"], out=tmp_path / "out")


@pytest.mark.slow
def test_exported_class_map_has_the_scores_of_its_checkpoint(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = unpack("coco_free_semantic", tmp_path_factory)
    names = scan_segmentation_folder(data).class_names
    file = segmenter_file(tmp_path / "segmenter.safetensors", names)
    options = ["--class-map", "--with-preprocessing"]
    assert main(["export", str(file), str(tmp_path / "classes.onnx"), *options]) == 0
    expected = evaluate_segmenter(file, data, own_size=True)["confusion"]
    found = evaluate_segmenter(tmp_path / "classes.onnx", data, own_size=True)["confusion"]
    difference = np.abs(np.array(found) - np.array(expected)).sum()
    assert difference <= 1e-3 * np.array(expected).sum()
