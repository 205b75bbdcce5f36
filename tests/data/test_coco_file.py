"""`read_coco`: parsed annotations, and skipped or repaired problems."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightspine.data.detection import read_coco
from lightspine.errors import LightspineError, UsageError
from support.coco import content, read_small, real_annotations, square, write_coco


@pytest.mark.parametrize(
    ("archive", "split", "images", "objects", "crowds"),
    [
        ("fixtures_tiny", "coco", 6, 32, 0),
        ("fixtures_tiny", "nuclei", 8, 59, 0),
        ("coco_free", "train", 59, 583, 6),
        ("coco_free", "val", 66, 560, 8),
        ("nuclei_dsb2018", "val", 133, 6049, 0),
    ],
)
def test_read_coco_of_real_files_leaves_nothing_out(
    archive: str, split: str, images: int, objects: int, crowds: int, tmp_path_factory: Any
) -> None:
    found = real_annotations(archive, split, tmp_path_factory)
    assert (len(found), len(found.labels), int(found.crowd.sum())) == (images, objects, crowds)
    assert not found.issues


def test_to_coco_gives_back_what_was_read(tmp_path_factory: Any) -> None:
    found = real_annotations("coco_free", "val", tmp_path_factory)
    file = tmp_path_factory.getbasetemp() / "real/coco_free/annotations/instances_val2017.json"
    kept = ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")

    def objects(described: dict[str, Any]) -> list[list[Any]]:
        return sorted(
            [[entry[key] for key in kept] for entry in described["annotations"]], key=lambda e: e[:3]
        )

    assert objects(found.to_coco()) == objects(json.loads(file.read_bytes()))


def test_read_coco_numbers_categories_with_gaps_by_their_ids(tmp_path: Path) -> None:
    found = read_small(tmp_path, square(), square(category_id=3))
    assert (found.class_names, found.category_ids, found.labels.tolist()) == (["cat", "dog"], [3, 7], [1, 0])


def test_read_coco_with_class_names_numbers_by_the_model(tmp_path: Path) -> None:
    found = read_small(tmp_path, square(), class_names=["dog", "bird", "cat"])
    assert (found.labels.tolist(), found.category_ids) == ([0], [7, 8, 3])


def test_read_coco_keeps_images_without_objects(tmp_path: Path) -> None:
    found = read_small(tmp_path, square(), images=3)
    assert [len(found.objects(i)) for i in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("flaw", "kind"),
    [
        pytest.param({"image_id": 99}, "object of an unknown image", id="image"),
        pytest.param({"category_id": 5}, "object of an unknown category", id="category"),
        pytest.param({"category_id": [7]}, "object of an unknown category", id="category is a list"),
        pytest.param({"bbox": [1, 2, 3]}, "box that is not four finite numbers", id="three numbers"),
        pytest.param({"bbox": [1, 2, 3, float("nan")]}, "box that is not four finite numbers", id="nan"),
        pytest.param({"bbox": [5, 5, 0, 9]}, "box without area", id="no area"),
        pytest.param({"bbox": [64, 5, 10, 9]}, "box outside the image", id="outside"),
        pytest.param({"segmentation": []}, "no polygon of three corners or more", id="no mask"),
        pytest.param(
            {"segmentation": {"size": [9, 9], "counts": [0, 81]}},
            "a mask of another size than the image",
            id="mask size",
        ),
    ],
)
def test_read_coco_with_a_flawed_object_leaves_it_out_and_counts_it(
    flaw: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    found = read_small(tmp_path, square(), square(id=2, **flaw))
    assert (len(found.labels), dict(found.issues.counts)) == (1, {kind: 1})
    assert str(found.issues) == f"1 x {kind}, first annotation 2"


def test_read_coco_without_masks_keeps_objects_that_have_none(tmp_path: Path) -> None:
    entry = square()
    del entry["segmentation"]
    assert len(read_small(tmp_path, entry, masks=False).labels) == 1


def test_read_coco_without_an_area_takes_the_box_and_says_so(tmp_path: Path) -> None:
    found = read_small(tmp_path, square(area=None))
    assert found.areas.tolist() == [400.0]
    assert found.issues.sentences() == ["1 x area missing, replaced by that of the box, first annotation 1"]


def test_read_coco_with_a_missing_image_names_it(tmp_path: Path) -> None:
    file = write_coco(tmp_path, content(square(), square(image_id=2), images=2))
    (tmp_path / "2.jpg").unlink()
    found = read_coco(file, tmp_path)
    assert (len(found), len(found.labels), str(found.issues)) == (
        1,
        1,
        "1 x image file missing, first 2.jpg",
    )


def test_corners_of_a_box_that_crosses_the_border_are_cut(tmp_path: Path) -> None:
    found = read_small(tmp_path, square(bbox=[-5, 40, 20, 20]))
    assert found.corners(0).tolist() == [[0, 40, 15, 48]]


def _without(key: str) -> dict[str, Any]:
    described = content(square())
    del described[key]
    return described


def _with_image(**changes: Any) -> dict[str, Any]:
    described = content(square())
    described["images"][0] |= changes
    return described


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param("{", "it is not JSON", id="broken"),
        pytest.param("[" * 200_000, "it is not JSON", id="nested"),
        pytest.param("[]", "expected a list 'images' in it", id="list"),
        pytest.param(
            json.dumps(_without("annotations")), "expected a list 'annotations'", id="no annotations"
        ),
        pytest.param(json.dumps(_with_image(width=0)), "needs a height and a width", id="no width"),
        pytest.param(json.dumps(_with_image(id="a")), "needs a whole number as id", id="id is a text"),
        pytest.param(
            json.dumps(content() | {"images": content()["images"] * 2}),
            "image id 1 appears twice",
            id="same image",
        ),
        pytest.param(
            json.dumps(content() | {"categories": content()["categories"][:1] * 2}),
            "category id 7 appears twice",
            id="same category",
        ),
    ],
)
def test_read_coco_of_a_file_that_is_no_coco_file_says_so(text: str, sentence: str, tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    file.write_text(text)
    with pytest.raises(LightspineError, match=sentence) as caught:
        read_coco(file, tmp_path)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        pytest.param(content() | {"images": []}, "found none of the 0 images", id="no image"),
        pytest.param(content() | {"categories": []}, "at least one category", id="no category"),
        pytest.param(
            content(square(bbox=[0, 0, 0, 0])),
            "none of the 1 objects of .* can be used: 1 x box without area, first annotation 1",
            id="no usable object",
        ),
    ],
)
def test_read_coco_of_nothing_usable_is_refused(
    described: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    file = write_coco(tmp_path, described)
    with pytest.raises(UsageError, match=sentence):
        read_coco(file, tmp_path)


def test_read_coco_in_a_wrong_folder_names_an_image(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "right")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(UsageError, match=r"found none of the 1 images .*, such as 1\.jpg"):
        read_coco(file, tmp_path / "wrong")


def test_read_coco_with_a_category_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"category 'dog' of .* is not among the model's 1 classes"):
        read_small(tmp_path, square(), class_names=["cat"])


@pytest.mark.parametrize(
    ("file", "folder", "sentence"),
    [
        ("none.json", ".", "expected a COCO file, but .*none.json does not exist"),
        ("objects.json", "none", "expected a folder of images, but .*none does not exist"),
        (".", ".", "is a folder"),
    ],
)
def test_read_coco_of_a_missing_path_is_refused(
    file: str, folder: str, sentence: str, tmp_path: Path
) -> None:
    write_coco(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        read_coco(tmp_path / file, tmp_path / folder)


def test_aspect_ratios_are_width_over_height(tmp_path: Path) -> None:
    assert np.allclose(read_small(tmp_path, square()).aspect_ratios, [64 / 48])
