"""Pictures of ground truth, as the trainer sees it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.ground_truth import draw_ground_truth
from support.coco import content, square, write_coco
from support.images import truncate, write_folder, write_image

CROWD = {"iscrowd": 1, "segmentation": {"size": [48, 64], "counts": [0, 48 * 64]}}


def _write_coco(root: Path, *annotations: dict[str, Any], images: int = 2) -> Path:
    for split in ("train", "val"):
        file = write_coco(root / split, content(*annotations, images=images))
        (root / "annotations").mkdir(exist_ok=True)
        file.rename(root / "annotations" / f"instances_{split}.json")
    return root


def _write_segmentation(root: Path) -> Path:
    for split in ("train", "val"):
        for number in range(2):
            write_image(root / "images" / split / f"{number}.jpg", (90, 60, 200), size=(64, 48))
            path = root / "annotations" / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((np.arange(48 * 64).reshape(48, 64) < 768).astype(np.uint8)).save(path)
    (root / "classes.txt").write_text("sky\nroad\n")
    return root


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).astype(int)


def test_objects_are_those_of_training(tmp_path: Path) -> None:
    entries = square(), square(category_id=3), square(id=3, **CROWD)
    [drawn] = draw_ground_truth(_write_coco(tmp_path / "d", *entries), tmp_path / "p")
    assert drawn.content == "1 x cat, 1 x dog"
    assert drawn.picture == tmp_path / "p" / "000_1.png"
    # The square reaches from 10 to 30 px of an image that is drawn ten times larger.
    picture = _pixels(drawn.picture)
    assert picture.shape == (480, 640, 3)
    assert np.abs(picture[100:300, 100:300] - picture[320:470, 400:600].mean(axis=(0, 1))).mean() > 20


def test_validation_keeps_crowds_and_images_without_objects(tmp_path: Path) -> None:
    root = _write_coco(tmp_path / "d", square(), square(id=3, **CROWD))
    drawn = draw_ground_truth(root, tmp_path / "p", split="val")
    assert [sample.content for sample in drawn] == ["2 x dog", "no object"]


def test_boxes_without_masks_are_drawn(tmp_path: Path) -> None:
    entry = square()
    del entry["segmentation"]
    [drawn] = draw_ground_truth(_write_coco(tmp_path / "d", entry), tmp_path / "p")
    assert drawn.content == "1 x dog"


def test_augmented_images_have_the_size_of_training(tmp_path: Path) -> None:
    root = _write_coco(tmp_path / "d", square())
    [drawn] = draw_ground_truth(root, tmp_path / "p", augmented=True)
    assert _pixels(drawn.picture).shape == (800, 1067, 3)


def test_settings_of_a_recipe_are_used(tmp_path: Path) -> None:
    root = _write_coco(tmp_path / "d", square())
    [drawn] = draw_ground_truth(root, tmp_path / "p", augmented=True, recipe="nuclei_retinanet_shvit_s1")
    assert _pixels(drawn.picture).shape == (480, 640, 3)
    assert drawn.content == "1 x dog"


def test_label_maps_are_drawn_with_shares(tmp_path: Path) -> None:
    drawn = draw_ground_truth(_write_segmentation(tmp_path / "d"), tmp_path / "p")
    assert [sample.content for sample in drawn] == ["sky 75%, road 25%"] * 2


def test_augmented_label_maps_have_the_padding_of_training(tmp_path: Path) -> None:
    root = _write_segmentation(tmp_path / "d")
    [drawn] = draw_ground_truth(root, tmp_path / "p", count=1, augmented=True)
    # Crops of 512 px are enlarged to 640 px, beside a legend of 260 px.
    assert _pixels(drawn.picture).shape == (640, 900, 3)


@pytest.mark.parametrize("augmented", [False, True])
def test_classes_are_drawn_in_one_picture(augmented: bool, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", splits=("train", "val"))
    drawn = draw_ground_truth(root, tmp_path / "p", count=5, augmented=augmented)
    assert {sample.picture for sample in drawn} == {tmp_path / "p" / "samples.png"}
    assert all(Path(sample.image).parent.name == sample.content for sample in drawn)


def test_choice_depends_on_the_seed_alone(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", splits=("train", "val"))
    first, again, other = (
        [sample.image for sample in draw_ground_truth(root, tmp_path / "p", count=3, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_image_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    root = _write_coco(tmp_path / "d", square())
    truncate(root / "train" / "1.jpg")
    with pytest.raises(LightspineError, match=r"cannot read image .*1\.jpg"):
        draw_ground_truth(root, tmp_path / "p")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "a count of at least 1, got 'train' and 0"),
        ({"split": "test"}, "expected the split train or val"),
        ({"split": "val", "augmented": True}, "validation images have none"),
        ({"recipe": "digits_shvit_s1"}, "expected a recipe that reads a folder"),
        ({"recipe": "no_recipe"}, "expected a file or the name of a recipe"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        draw_ground_truth(_write_coco(tmp_path / "d", square()), tmp_path / "p", **options)


def test_recipe_that_names_another_class_is_not_run(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {{class_path: subprocess.Popen, init_args: {{root: x, args: touch {tmp_path / 'f'}}}}}\n"
    )
    with pytest.raises(UsageError, match=r"expected a data module of lightspine\.data\.modules"):
        draw_ground_truth(_write_coco(tmp_path / "d", square()), tmp_path / "p", recipe=str(recipe))
    assert not (tmp_path / "f").exists()


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone does not exist"):
        draw_ground_truth(tmp_path / "gone", tmp_path / "p")
