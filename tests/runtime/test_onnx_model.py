"""`lightspine_runtime.OnnxModel`: the same predictions as the checkpoint in PyTorch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from PIL import Image

import lightspine
import lightspine_runtime
from lightspine.data import Preprocessing
from lightspine.data.transforms import create_eval_transform
from lightspine.errors import UsageError
from lightspine.evaluation import predict as predict_with_checkpoint
from lightspine.export import export_onnx
from lightspine.export.onnx_network import OnnxNetwork, load_onnx
from lightspine_runtime import OnnxModel, predict
from lightspine_runtime.preprocessing import normalize, resize_and_crop
from support.checkpoints import save_small
from support.images import COLOURS, write_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its exports and images."""
    folder = tmp_path_factory.mktemp("runtime")
    save_small(folder / "model.safetensors", classes=list(COLOURS))
    model, saved = lightspine.load_model(folder / "model.safetensors")
    known: dict[str, Any] = {"class_names": saved.class_names, "preprocessing": saved.preprocessing}
    export_onnx(model, folder / "model.onnx", shapes=[(1, 32, 32)], **known)
    export_onnx(model, folder / "pixels.onnx", fixed_size=(32, 32), with_preprocessing=True, **known)
    write_folder(folder / "images", count=2)
    return folder


@pytest.mark.parametrize("name", ["model.onnx", "pixels.onnx"])
def test_predictions_are_those_of_the_checkpoint(name: str, place: Path) -> None:
    images = sorted((place / "images").rglob("*.jpg"))
    expected = predict_with_checkpoint(place / "model.safetensors", images)
    for ours, theirs in zip(predict(place / name, images), expected, strict=True):
        assert ours.path == theirs.path
        assert [score.name for score in ours.classes] == [score.name for score in theirs.classes]
        probabilities = [score.probability for score in ours.classes]
        assert probabilities == pytest.approx([score.probability for score in theirs.classes], abs=1e-5)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("input_size", [(3, 224, 224), (3, 96, 160)], ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(300, 200), (97, 161), (40, 400)], ids=str)
def test_images_are_prepared_as_in_training(
    crop_mode: str, interpolation: str, input_size: Any, crop_pct: float, size: tuple[int, int]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    preprocessing = Preprocessing(
        input_size=input_size, crop_mode=crop_mode, interpolation=interpolation, crop_pct=crop_pct
    )
    preparation = lightspine_runtime.Preprocessing.from_mapping(preprocessing.to_dict(), "test")
    expected = create_eval_transform(preprocessing)(image).numpy()
    np.testing.assert_allclose(
        normalize(resize_and_crop(image, preparation), preparation), expected, atol=1e-5
    )


def test_neither_torch_nor_the_library_is_imported(place: Path) -> None:
    script = (
        "import sys; from lightspine_runtime import predict\n"
        f"predict({str(place / 'model.onnx')!r}, [{str(place / 'images' / 'red' / '0.jpg')!r}])\n"
        "print([name for name in ('torch', 'timm', 'lightspine', 'onnx') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_library_does_not_import_onnx_runtime() -> None:
    script = (
        "import sys, lightspine\nprint([n for n in ('onnx', 'onnxruntime', 'lightning') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_file_is_a_network_like_any_other(place: Path) -> None:
    network, saved = load_onnx(place / "model.onnx")
    model, _ = lightspine.load_model(place / "model.safetensors")
    images = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), model(images), atol=1e-5, rtol=1e-4)
    assert (saved.name, saved.class_names, network.num_classes) == ("test_resnet", list(COLOURS), 3)
    assert saved.preprocessing["input_size"] == [3, 32, 32]


def test_network_of_a_file_that_takes_pixels_takes_normalized_images_too(place: Path) -> None:
    network, _ = load_onnx(place / "pixels.onnx")
    model, saved = lightspine.load_model(place / "model.safetensors")
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    preprocessing = lightspine_runtime.Preprocessing.from_mapping(saved.preprocessing, "test")
    images = torch.from_numpy(normalize(np.asarray(pixels)[None], preprocessing))
    with torch.inference_mode():
        torch.testing.assert_close(network(images), model(images), atol=1e-5, rtol=1e-4)


def test_missing_file_is_named() -> None:
    with pytest.raises(lightspine_runtime.UsageError, match=r"absent\.onnx does not exist"):
        OnnxModel("absent.onnx")


def test_file_that_is_no_onnx_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(lightspine_runtime.LightspineError, match=r"ONNX Runtime cannot run .*text\.onnx"):
        OnnxModel(tmp_path / "text.onnx")


def test_function_without_a_body_is_named(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "lightspine" : 1]>
    scan (float[1, 4, 8] x, float[1, 8] bias, float[1, 8, 2] A, float[1, 4, 2] B) => (float[1, 4, 8] y)
    { y = lightspine.SequenceScan(x, x, bias, A, B, B) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "stripped.onnx")
    message = r"expected the body of the function SequenceScan in .*stripped\.onnx, which calls it"
    with pytest.raises(lightspine_runtime.LightspineError, match=message):
        OnnxModel(tmp_path / "stripped.onnx")


def test_foreign_file_is_refused(place: Path, tmp_path: Path) -> None:
    foreign = onnx.load(place / "model.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(lightspine_runtime.UsageError, match="expected a file that `lightspine export` wrote"):
        predict(tmp_path / "foreign.onnx", [])


def test_batch_of_another_shape_is_refused(place: Path) -> None:
    model = OnnxModel(place / "model.onnx")
    message = r"expected a batch of shape .* got one of \(1, 32, 32, 3\)"
    with pytest.raises(lightspine_runtime.UsageError, match=message):
        model.run(np.zeros((1, 32, 32, 3), np.float32))


def test_number_of_classes_to_tell_is_checked(place: Path) -> None:
    with pytest.raises(lightspine_runtime.UsageError, match="topk of at least 1, got 0"):
        predict(place / "model.onnx", [], topk=0)


def test_network_of_maps_is_no_classifier(place: Path) -> None:
    model = OnnxModel(place / "model.onnx")
    model.outputs, model.kind = ["map0", "map1"], "features"
    with pytest.raises(
        UsageError, match=r"model\.onnx holds a backbone without a classifier; pass the check"
    ):
        OnnxNetwork(model)
