"""COCO masks: polygons and run-length encodings (RLE), plain or compressed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import mask as mask_api

from lightspine.data.detection.coco_values import to_float
from lightspine.errors import LightspineError

Segmentation = list[list[float]] | dict[str, Any]
"""Mask as stored in the file: polygons [x1, y1, x2, y2, ...], or {"size": [height, width], "counts": ...}."""

_MAX_CHARACTERS = 12
"""Maximum characters of a compressed number: each holds five bits of at most 64."""

NO_MASK = "no mask"
"""Problem of an object without a field `segmentation`."""


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Validate the mask of an annotation without decoding it.

    Args:
        segmentation: field `segmentation` of the annotation.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Raises:
        LightspineError: it is neither polygons nor an RLE, is for an image of another size, or is empty.
    """
    if isinstance(segmentation, dict):
        if not _run_lengths(segmentation, height, width)[1::2].any():
            raise LightspineError("a mask without pixels")
    elif isinstance(segmentation, list):
        _check_polygons(segmentation, height, width)
    else:
        raise LightspineError(NO_MASK)


def normalize_segmentation(segmentation: Any) -> Any:
    """Convert COCO polygons that are flat or nested otherwise to a list of flat polygons.

    `[x1, y1, ...]`, `[[x1, y1], ...]` and `[[[x1, y1], ...], ...]` become `[[x1, y1, ...], ...]`; numbers
    written as text become numbers. Everything else is returned as it is.
    """
    if not isinstance(segmentation, list) or not segmentation:
        return segmentation
    if not any(isinstance(part, list) for part in segmentation) or (
        len(segmentation) > 2 and all(map(_is_point, segmentation))
    ):
        segmentation = [segmentation]
    return [_flatten_polygon(polygon) for polygon in segmentation]


def bounding_box(segmentation: Segmentation, height: int, width: int) -> list[float]:
    """Return the bounding box of a checked mask, left, top, width, height; that of polygons is exact.

    Args:
        segmentation: mask that `check_segmentation` accepts.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    if isinstance(segmentation, dict):
        rows, columns = np.nonzero(decode_segmentation(segmentation, height, width))
        left, top = columns.min(), rows.min()
        return [float(side) for side in (left, top, columns.max() + 1 - left, rows.max() + 1 - top)]
    polygons = _check_polygons(segmentation, height, width)
    x = [value for polygon in polygons for value in polygon[0::2]]
    y = [value for polygon in polygons for value in polygon[1::2]]
    return [float(min(x)), float(min(y)), float(max(x) - min(x)), float(max(y) - min(y))]


def _is_point(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 2 and not any(isinstance(side, list) for side in part)


def _flatten_polygon(polygon: Any) -> Any:
    if not isinstance(polygon, list):
        return polygon
    if polygon and all(map(_is_point, polygon)):
        polygon = [side for point in polygon for side in point]
    return [to_float(value) if isinstance(value, str) else value for value in polygon]


def decode_segmentation(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """Decode the mask of an annotation.

    An RLE runs down the columns, and its first run counts zeros. The compressed form stores each run as the
    difference from the run two before it, in characters of five bits.

    Args:
        segmentation: field `segmentation` of the annotation.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        (height, width), uint8, 1 inside the mask.

    Raises:
        LightspineError: see `check_segmentation`.
    """
    if isinstance(segmentation, dict):
        runs = _run_lengths(segmentation, height, width)
        return np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs).reshape(width, height).T
    encoded = mask_api.frPyObjects(_check_polygons(segmentation, height, width), height, width)
    return np.asarray(mask_api.decode(mask_api.merge(encoded)))


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask, (height, width), as a compressed RLE that can be stored as JSON."""
    encoded = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = encoded["counts"]
    return {
        "size": [int(side) for side in encoded["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def _check_polygons(segmentation: Sequence[Any], height: int, width: int) -> list[list[float]]:
    """Return the polygons with at least three corners."""
    polygons = []
    # Rasterization time grows with the length of the edges.
    far = max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(_is_number(value) for value in polygon):
            raise LightspineError("a polygon that is not a list of finite numbers")
        if len(polygon) % 2:
            raise LightspineError("a polygon with an odd number of coordinates")
        if any(not -far <= value <= 2 * far for value in polygon):
            raise LightspineError("a polygon far outside the image")
        if min(height, width) > 1 and all(0 <= value <= 1 for value in polygon):
            raise LightspineError("a polygon inside the first pixel, as if in fractions of the image")
        if len(polygon) >= 6:
            polygons.append(polygon)
    if not polygons:
        raise LightspineError("no polygon of three corners or more")
    return polygons


def _is_number(value: Any) -> bool:
    # A whole number of hundreds of digits is not finite as a float.
    return type(value) in (int, float) and to_float(value) is not None


def _run_lengths(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Return the validated run lengths; invalid ones make the mask library access memory out of bounds."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise LightspineError("a mask of another size than the image")
    if isinstance(counts, str):
        runs = _decompress(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**40 for count in counts):
        runs = np.asarray(counts, dtype=np.int64)
    else:
        raise LightspineError("run lengths that are neither a text nor a list of whole numbers")
    if (runs < 0).any() or runs.sum() != height * width:
        raise LightspineError("run lengths that do not fill the image")
    return runs


def _decompress(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise LightspineError("run lengths that are not a compressed text")
    # Bit 5 means that the number continues in the next character.
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_CHARACTERS:
        raise LightspineError("run lengths that are not a compressed text")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    # Bit 4 of the last character is the sign.
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    # From the fourth run on, the difference from the run two before is stored.
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs
