"""Loading models and images for analysis: sizes, limits and errors."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lightspine
from lightspine.analysis import expand_image_paths, open_model, read_image
from lightspine.analysis.image_input import MAX_PIXELS, bounded_size
from lightspine.data import Preprocessing, create_eval_transform, open_image
from lightspine.errors import LightspineError, UsageError
from lightspine.models.saving import save_checkpoint
from support.images import truncate, write_image


def test_picture_equals_the_evaluations_input(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (9, 99, 200), size=(77, 61))
    handle = open_model("shvit_s1")
    expected = create_eval_transform(Preprocessing.from_config(handle.network.pretrained_cfg))(
        open_image(path)
    )
    assert read_image(handle, path).pixels.equal(expected[None])


def test_shown_image_is_what_the_network_sees(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (9, 99, 200), size=(64, 48))
    picture = read_image(open_model("shvit_s1", size="native"), path)
    np.testing.assert_array_equal(picture.display, np.asarray(Image.open(path)))
    assert picture.note == "64x48 px seen as 64x48"


def test_huge_image_at_native_size_is_reduced_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (3000, 1000), (9, 99, 200)).save(tmp_path / "huge.png")
    with caplog.at_level(logging.INFO, "lightspine"):
        picture = read_image(open_model("shvit_s1", size="native"), tmp_path / "huge.png")
    height, width = picture.size
    assert height * width <= MAX_PIXELS
    assert width / height == pytest.approx(3, rel=0.01)
    assert "huge: reduced from 3000x1000 px to 886x295 px to bound memory" in caplog.text


@pytest.mark.parametrize("size", [(100, 99), (9000, 40), (40, 9000), (5000, 7001)])
def test_bounded_size_keeps_the_bound_and_the_least_side(size: tuple[int, int]) -> None:
    height, width = bounded_size(*size)
    assert height * width <= MAX_PIXELS
    assert min(height, width) >= 32
    assert (height > width) == (size[0] > size[1])


def test_checkpoint_brings_its_classes_and_size(tmp_path: Path) -> None:
    model = lightspine.create_model("shvit_s1", num_classes=2)
    about = Preprocessing(input_size=(3, 48, 64)).to_dict()
    file = save_checkpoint(model, tmp_path / "m.safetensors", class_names=["a", "b"], preprocessing=about)
    handle = open_model(file)
    assert handle.trained
    assert handle.class_names == ["a", "b"]
    assert handle.preprocessing.input_size == (3, 48, 64)
    assert open_model("shvit_s1", file).class_names == ["a", "b"]


def test_name_alone_has_the_same_initial_weights_each_time() -> None:
    first, second = (open_model("shvit_s1") for _ in range(2))
    assert not first.trained
    for one, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("shvit_s9", {}, "shvit_s1"),
        ("gone/model.safetensors", {}, "gone/model.safetensors does not exist"),
        ("shvit_s1", {"size": 16}, "at least 32x32 px, got 16x16"),
        ("shvit_s1", {"device": "cuda:77"}, "device 'cuda:77' is not available"),
        ("vit_tiny_patch16_224", {"size": (97, 161)}, "takes images of 224x224 px only, got 97x161"),
        (
            "vit_tiny_patch16_224",
            {"size": "native"},
            "takes images of 224x224 px only, not their native size",
        ),
    ],
)
def test_wrong_network_is_one_sentence(model: str, more: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_model(model, **more)


def test_module_beside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a name besides the checkpoint"):
        open_model(lightspine.create_model("shvit_s1"), tmp_path / "m.safetensors")


def test_damaged_image_is_named(tmp_path: Path) -> None:
    path = truncate(write_image(tmp_path / "half.jpg", (1, 2, 3), size=(99, 99)))
    with pytest.raises(LightspineError, match=r"cannot read image .*half\.jpg"):
        read_image(open_model("shvit_s1"), path)


def test_folders_are_replaced_by_their_images(tmp_path: Path) -> None:
    inside = [write_image(tmp_path / "f" / name, (1, 2, 3)) for name in ("a/2.png", "b.png")]
    alone = write_image(tmp_path / "z.png", (1, 2, 3))
    assert expand_image_paths([alone, tmp_path / "f"]) == [alone, *inside]


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected images in .*, found none"):
        expand_image_paths([tmp_path])
