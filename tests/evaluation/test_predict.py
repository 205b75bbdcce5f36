"""`predict`: top classes of image files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightspine
from lightspine.data import Preprocessing
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import predict
from lightspine.models.saving import save_checkpoint
from support.images import COLOURS, truncate, write_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = lightspine.create_model("shvit_s1", num_classes=3)
    preprocessing = Preprocessing(input_size=(3, 64, 64)).to_dict()
    path = tmp_path_factory.mktemp("predict") / "colours.safetensors"
    return save_checkpoint(model, path, class_names=list(COLOURS), preprocessing=preprocessing)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_image(tmp_path / f"{name}.png", colour) for name, colour in COLOURS.items()]


def test_predictions_come_in_the_order_of_the_images(checkpoint: Path, images: list[Path]) -> None:
    assert [p.path for p in predict(checkpoint, images[::-1])] == images[::-1]


def test_probabilities_fall_and_sum_to_one(checkpoint: Path, images: list[Path]) -> None:
    for prediction in predict(checkpoint, images, topk=3):
        values = [score.probability for score in prediction.classes]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert {score.name for score in prediction.classes} == set(COLOURS)


def test_topk_limits_the_classes(checkpoint: Path, images: list[Path]) -> None:
    assert [len(p.classes) for k in (1, 2, 9) for p in predict(checkpoint, images[:1], topk=k)] == [1, 2, 3]


def test_name_with_checkpoint_predicts_like_the_file_alone(checkpoint: Path, images: list[Path]) -> None:
    assert predict("shvit_s1", images, checkpoint=checkpoint) == predict(checkpoint, images)


def test_official_file_of_imagenet_gives_names_of_its_classes(tmp_path: Path, images: list[Path]) -> None:
    torch.save({"model": lightspine.create_model("shvit_s1").state_dict()}, tmp_path / "official.pth")
    (prediction,) = predict("shvit_s1", images[:1], checkpoint=tmp_path / "official.pth", topk=1000)
    assert any("tench" in score.name for score in prediction.classes)


def test_unreadable_image_is_named(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    bad = truncate(write_image(tmp_path / "half.jpg", (1, 2, 3), size=(99, 99)))
    with pytest.raises(LightspineError, match=r"cannot read image .*half\.jpg"):
        predict(checkpoint, [*images, bad])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("shvit_s1", "expected a checkpoint with the model name 'shvit_s1'"),
        ("gone/model.safetensors", "gone/model.safetensors does not exist"),
    ],
)
def test_model_without_weights_is_refused(model: str, message: str, images: list[Path]) -> None:
    with pytest.raises(UsageError, match=message):
        predict(model, images)


def test_topk_below_one_is_refused(checkpoint: Path, images: list[Path]) -> None:
    with pytest.raises(UsageError, match="topk of at least 1, got 0"):
        predict(checkpoint, images, topk=0)


def test_predicting_does_not_import_lightning() -> None:
    code = "import sys, lightspine.evaluation; sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
