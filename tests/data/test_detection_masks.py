"""COCO masks: polygons and run-length encodings (RLE)."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as pycocotools_mask

from lightspine.data.detection import decode_segmentation, encode_mask
from lightspine.data.detection.masks import check_segmentation
from lightspine.errors import LightspineError
from support.coco import real_files


def _pycocotools(segmentation: Any, height: int, width: int) -> np.ndarray:
    encoded = segmentation
    if isinstance(segmentation, list):
        encoded = pycocotools_mask.merge(pycocotools_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = pycocotools_mask.frPyObjects(segmentation, height, width)
    return pycocotools_mask.decode(encoded)


# pycocotools is built for an older numpy.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("archive", "split"),
    [("fixtures_tiny", "nuclei"), ("nuclei_dsb2018", "val"), ("coco_free", "train"), ("coco_free", "val")],
)
def test_decode_segmentation_of_real_files_equals_pycocotools(
    archive: str, split: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    described = json.loads(real_files(archive, split, tmp_path_factory)[0].read_bytes())
    sizes = {image["id"]: (image["height"], image["width"]) for image in described["images"]}
    # One in three is some 2,000 of the nuclei.
    for annotation in described["annotations"][:: 3 if len(described["annotations"]) > 1000 else 1]:
        size = sizes[annotation["image_id"]]
        expected = _pycocotools(annotation["segmentation"], *size)
        assert np.array_equal(decode_segmentation(annotation["segmentation"], *size), expected)


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1)))
def test_encode_mask_comes_back_whole(mask: np.ndarray) -> None:
    assert np.array_equal(decode_segmentation(encode_mask(mask), *mask.shape), mask)


def test_decode_segmentation_of_plain_run_lengths_goes_down_the_columns() -> None:
    mask = decode_segmentation({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert mask.tolist() == [[0, 1, 0], [1, 0, 0]]


RUNS = {"size": [4, 5], "counts": [5, 15]}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        pytest.param(None, "no mask", id="none"),
        pytest.param([], "no polygon of three corners", id="no polygon"),
        pytest.param([[0, 0, 3, 3]], "no polygon of three corners", id="two corners"),
        pytest.param([[0, 0, 3, 3, 1]], "odd number", id="odd"),
        pytest.param([[0, 0, 3, float("nan"), 1, 2]], "not a list of finite numbers", id="nan"),
        pytest.param([["0", 0, 3, 0, 1, 2]], "not a list of finite numbers", id="text"),
        pytest.param([[0, 0, 1e9, 0, 1, 2]], "far outside", id="far"),
        pytest.param(RUNS | {"size": [5, 4]}, "another size", id="other size"),
        pytest.param(RUNS | {"counts": [5, 14]}, "do not fill", id="short runs"),
        pytest.param(RUNS | {"counts": [5, 10**15, 5]}, "whole numbers", id="huge run"),
        pytest.param(RUNS | {"counts": [25, -5]}, "whole numbers", id="negative run"),
        pytest.param(RUNS | {"counts": [20]}, "without pixels", id="empty"),
        pytest.param(RUNS | {"counts": None}, "neither", id="no counts"),
        pytest.param(RUNS | {"counts": ""}, "compressed", id="empty text"),
        pytest.param(RUNS | {"counts": "5~"}, "compressed", id="foreign character"),
        pytest.param(RUNS | {"counts": "5P"}, "compressed", id="cut off"),
        pytest.param(RUNS | {"counts": "P" * 40 + "0"}, "compressed", id="endless number"),
        pytest.param(RUNS | {"counts": "é"}, "compressed", id="not ascii"),
        pytest.param(RUNS | {"counts": "\ud800"}, "compressed", id="half of a character"),
    ],
)
def test_check_segmentation_of_a_damaged_mask_says_why(segmentation: Any, reason: str) -> None:
    with pytest.raises(LightspineError, match=reason):
        check_segmentation(segmentation, 4, 5)
