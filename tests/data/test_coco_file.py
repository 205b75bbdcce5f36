"""`read_coco`: parsed annotations, and skipped or repaired problems."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightspine.data.detection import decode_segmentation, read_coco
from lightspine.errors import LightspineError, UsageError
from support.coco import SQUARE, content, read_small, real_annotations, square, write_coco
from support.images import write_image


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


def _without(key: str) -> dict[str, Any]:
    described = content(square())
    del described[key]
    return described


def _with_image(**changes: Any) -> dict[str, Any]:
    described = content(square())
    described["images"][0] |= changes
    return described


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


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param("{", "it is not JSON", id="broken"),
        pytest.param("[" * 200_000, "it is not JSON", id="nested"),
        pytest.param("[]", "expected a list 'images' in it", id="list"),
        pytest.param(
            json.dumps(_without("annotations")), "expected a list 'annotations'", id="no annotations"
        ),
        pytest.param(
            json.dumps(
                content()
                | {"images": [*content()["images"], content()["images"][0] | {"file_name": "2.jpg"}]}
            ),
            "image id 1 of .* belongs to 1.jpg and 2.jpg",
            id="one id of two images",
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
        pytest.param(
            _with_image(id="a"), "1 x image without a whole number as id, first image 0", id="id is a name"
        ),
        pytest.param(_with_image(id=2**64), "1 x image without a whole number as id", id="id of 65 bits"),
        pytest.param(_with_image(file_name=7), "1 x image without a file_name", id="no file name"),
        pytest.param(
            content(square(bbox=[0.1, 0.2, 0.5, 0.5])),
            "1 x box inside the first pixel, as if in fractions of the image",
            id="fractions",
        ),
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
    file = write_coco(tmp_path)
    file.write_text(json.dumps(described))
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


def _categories(*named: tuple[int, str]) -> dict[str, Any]:
    return {"categories": [{"id": number, "name": name} for number, name in named]}


ROBOFLOW = _categories((0, "fish"), (1, "fish"))


def test_training_and_validation_give_roboflows_duplicate_category_one_label(tmp_path: Path) -> None:
    file = write_coco(tmp_path, content(square(category_id=1)) | ROBOFLOW)
    train = read_coco(file, tmp_path)
    val = read_coco(file, tmp_path, class_names=train.class_names)
    assert (train.class_names, train.category_ids) == (["fish"], [1])
    assert train.labels.tolist() == val.labels.tolist() == [0]
    assert "category without objects that has the name of another one, first id 0, 'fish'" in str(val.issues)


def test_two_categories_of_one_name_with_objects_are_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path, content(square(category_id=0), square(category_id=1)) | ROBOFLOW)
    with pytest.raises(UsageError, match=r"the categories 0 and 1 of .* have the same name 'fish'"):
        read_coco(file, tmp_path)


@pytest.mark.parametrize("ids", [(3, 7), (7, 3), (40, 2)])
def test_categories_are_matched_by_name_when_ids_differ(ids: tuple[int, int], tmp_path: Path) -> None:
    described = content(square(category_id=ids[1])) | _categories((ids[0], "cat"), (ids[1], "dog"))
    found = read_coco(write_coco(tmp_path, described), tmp_path, class_names=["cat", "dog"])
    assert found.labels.tolist() == [1]
    assert found.category_ids == list(ids)


def test_category_name_that_differs_in_case_is_matched(tmp_path: Path) -> None:
    described = content(square()) | _categories((7, "Dog "))
    assert read_coco(write_coco(tmp_path, described), tmp_path, class_names=["cat", "dog"]).labels == [1]


def test_unused_category_that_the_model_lacks_is_counted(tmp_path: Path) -> None:
    found = read_small(tmp_path, square(), class_names=["dog"])
    assert found.issues.sentences() == [
        "1 x category without objects that is not among the model's classes, first 'cat'"
    ]


@pytest.mark.parametrize(
    ("value", "crowd"),
    [
        *((value, False) for value in (0, "0", 0.0, False, None, "false")),
        *((value, True) for value in (1, "1", 1.0, True, "true")),
    ],
)
def test_iscrowd_is_read_by_value(value: Any, crowd: bool, tmp_path: Path) -> None:
    assert read_small(tmp_path, square(iscrowd=value)).crowd.tolist() == [crowd]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bbox": ["10", "10.0", 20, "20"]}, id="box as text"),
        pytest.param({"image_id": "1"}, id="image id as text"),
        pytest.param({"image_id": 1.0}, id="image id as float"),
        pytest.param({"category_id": "7"}, id="category id as text"),
        pytest.param({"segmentation": SQUARE[0]}, id="polygon without the outer list"),
        pytest.param({"segmentation": [[10, 10], [30, 10], [30, 30], [10, 30]]}, id="points"),
        pytest.param({"segmentation": [[[10, 10], [30, 10], [30, 30], [10, 30]]]}, id="list of points"),
        pytest.param({"segmentation": [[str(side) for side in SQUARE[0]]]}, id="polygon as text"),
    ],
)
def test_values_of_clear_meaning_are_converted(changes: dict[str, Any], tmp_path: Path) -> None:
    found = read_small(tmp_path, square(**changes))
    assert found.boxes.tolist() == [[10, 10, 20, 20]]
    assert np.array_equal(decode_segmentation(found.segmentation(0), 48, 64)[9:31, 9:31].sum(), 400)
    assert not found.issues


@pytest.mark.parametrize("size", [(48.0, 64.0), ("48", "64")])
def test_image_size_of_another_type_is_converted(size: tuple[Any, Any], tmp_path: Path) -> None:
    file = write_coco(tmp_path, _with_image(height=size[0], width=size[1]))
    found = read_coco(file, tmp_path)
    assert (found.sizes.tolist(), bool(found.issues)) == ([[48, 64]], False)


@pytest.mark.parametrize("size", [None, 0])
def test_missing_image_size_is_read_from_the_file(size: Any, tmp_path: Path) -> None:
    found = read_coco(write_coco(tmp_path, _with_image(height=size)), tmp_path)
    assert found.sizes.tolist() == [[48, 64]]
    assert "1 x image without a height and a width in pixels, read from the file" in str(found.issues)


@pytest.mark.parametrize(
    "segmentation",
    [SQUARE, {"size": [48, 64], "counts": [10 * 48 + 10, *([20, 28] * 19), 20, 0]}],
    ids=["polygon", "RLE"],
)
def test_missing_box_is_that_of_the_mask(segmentation: Any, tmp_path: Path) -> None:
    if isinstance(segmentation, dict):
        segmentation["counts"][-1] = 48 * 64 - sum(segmentation["counts"][:-1])
    found = read_small(tmp_path, square(bbox=None, segmentation=segmentation))
    assert found.boxes.tolist() == [[10, 10, 20, 20]]
    assert str(found.issues) == "1 x box missing, replaced by that of the mask, first annotation 1"


@pytest.mark.parametrize(
    "name", ["sub\\1.jpg", "images/1.jpg", "/home/someone/data/1.jpg", "../1.jpg", "https://host/1.jpg"]
)
def test_image_is_found_under_the_last_part_of_its_name(name: str, tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    file.write_text(json.dumps(_with_image(file_name=name)))
    found = read_coco(file, tmp_path)
    assert found.path(0) == tmp_path / "1.jpg"
    assert f"found in the image folder, first {name}" in str(found.issues)


def test_images_of_one_name_in_two_folders_are_not_confused(tmp_path: Path) -> None:
    described = content(square(), square(image_id=2), square(image_id=3), images=3)
    file = write_coco(tmp_path, described)
    for image, name in zip(described["images"], ("a/1.jpg", "b/1.jpg", "3.jpg"), strict=True):
        image["file_name"] = name
    file.write_text(json.dumps(described))
    found = read_coco(file, tmp_path)
    assert (list(found.files), found.issues.counts["image file missing"]) == (["3.jpg"], 2)


def test_image_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "in", content(square(), square(image_id=2), images=2))
    (tmp_path / "in" / "2.jpg").rename(tmp_path / "2.jpg")
    described = json.loads(file.read_text())
    described["images"][1]["file_name"] = "../2.jpg"
    file.write_text(json.dumps(described))
    assert str(read_coco(file, tmp_path / "in").issues) == "1 x image file missing, first ../2.jpg"


def test_objects_of_an_image_with_two_ids_are_joined(tmp_path: Path) -> None:
    described = content(square(), square(id=2, image_id=2), images=2)
    described["images"][1]["file_name"] = "1.jpg"
    found = read_coco(write_coco(tmp_path, described), tmp_path)
    assert (found.image_ids.tolist(), len(found.objects(0))) == ([1], 2)
    assert str(found.issues) == "1 x image file with several ids, whose objects are joined, first 1.jpg"


def test_box_beyond_the_image_is_counted(tmp_path: Path) -> None:
    found = read_small(tmp_path, square(bbox=[30, 20, 60, 40]))
    assert str(found.issues) == "1 x box that reaches beyond the image, clipped, first annotation 1"


def test_numbers_of_hundreds_of_digits_are_counted(tmp_path: Path) -> None:
    polygon = [10**400, 10, 30, 10, 30, 30]
    flawed = square(id=2, bbox=[10**400, 1, 2, 3]), square(id=3, segmentation=[polygon])
    assert len(read_small(tmp_path, square(), *flawed).labels) == 1


def test_supercategory_of_all_others_without_objects_is_no_class(tmp_path: Path) -> None:
    described = content(square())
    described["categories"] = [{"id": 0, "name": "animals", "supercategory": "none"}] + [
        entry | {"supercategory": "animals"} for entry in described["categories"]
    ]
    found = read_coco(write_coco(tmp_path, described), tmp_path)
    assert (found.class_names, found.labels.tolist()) == (["cat", "dog"], [1])
    assert str(found.issues).startswith(
        "1 x category without objects that is the supercategory of all others"
    )


def test_boxes_without_any_mask_name_the_head_that_needs_none(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"1 x no mask.*; train a detector of boxes, with head retinanet and"
    ):
        read_small(tmp_path, square(segmentation=None))


def test_thousands_of_categories_are_read_in_a_second(tmp_path: Path) -> None:
    described = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 40}],
        "categories": [{"id": i, "name": f"c{i}", "supercategory": ["x"]} for i in range(20_000)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
    }
    write_image(tmp_path / "a.png", (1, 2, 3))
    (tmp_path / "a.json").write_text(json.dumps(described))
    started = time.process_time()
    assert len(read_coco(tmp_path / "a.json", tmp_path, masks=False).class_names) == 20_000
    # A set of the other categories for each of them took a minute.
    assert time.process_time() - started < 10
