"""`open_image`: any image file is decoded to upright 8-bit RGB or raises a LightspineError."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lightspine_runtime
from lightspine.data import decode_image, open_image
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import find_nvjpeg_size, read_image_file, read_image_size
from support.images import truncate, write_image


def _save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "grey.png"),
        ("P", "palette.png"),
        ("RGBA", "alpha.png"),
        ("CMYK", "cmyk.jpg"),
        ("1", "bits.png"),
        ("LA", "la.png"),
    ],
)
def test_open_image_gives_rgb_for_mode(tmp_path: Path, mode: str, name: str) -> None:
    path = _save(tmp_path / name, np.full((40, 50, 3), 255, np.uint8), mode)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (50, 40))
    assert np.asarray(image).min() > 250


def test_open_image_keeps_colours_of_transparent_palette(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "p.png", transparency=b"\x00\xff")
    assert open_image(tmp_path / "p.png").getpixel((5, 5)) == (10, 200, 30)


def test_open_image_scales_16_bit_values(tmp_path: Path) -> None:
    pixels = np.full((40, 40), 257 * 100, np.uint16)
    assert open_image(_save(tmp_path / "deep.png", pixels)).getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff", "a.gif", "a.bmp"])
def test_open_image_keeps_colour_of_format(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path / name, np.full((40, 50, 3), (200, 60, 20), np.uint8))
    assert np.allclose(np.asarray(open_image(path)), (200, 60, 20), atol=4)


def test_open_image_keeps_colour_of_cmyk(tmp_path: Path) -> None:
    path = _save(tmp_path / "print.jpg", np.full((40, 50, 3), (200, 60, 20), np.uint8), "CMYK")
    assert np.allclose(np.asarray(open_image(path)), (200, 60, 20), atol=4)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_open_image_scales_16_bit_tiff_of_byte_order(tmp_path: Path, order: str) -> None:
    pixels = np.full((40, 40), 257 * 100, dtype=order)
    Image.frombytes("I;16" if order == "<u2" else "I;16B", (40, 40), pixels.tobytes()).save(
        tmp_path / "d.tiff"
    )
    assert open_image(tmp_path / "d.tiff").getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_image_is_upright_for_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :16] = 255  # the upper left corner tells all eight apart
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "camera.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "camera.png")), upright)


def test_open_image_reads_past_broken_exif(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (9, 200, 9)).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0"
    )
    assert open_image(tmp_path / "a.jpg").size == (40, 40)


def test_decode_image_reads_bytes(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (10, 200, 30))
    assert np.array_equal(np.asarray(decode_image(path.read_bytes(), "a")), np.asarray(open_image(path)))


def test_decode_image_names_what_it_was_told() -> None:
    with pytest.raises(LightspineError, match=r"cannot read image shard\.tar/7\.jpg: it is not an image"):
        decode_image(b"nothing", "shard.tar/7.jpg")


def test_open_image_refuses_floating_point_pixels(tmp_path: Path) -> None:
    path = _save(tmp_path / "f.tiff", np.zeros((40, 40), np.float32))
    with pytest.raises(LightspineError, match=r"f\.tiff: expected integer pixels"):
        open_image(path)


def test_open_image_turns_by_exif_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    image = open_image(tmp_path / "turned.jpg")
    assert image.size == (40, 60)
    assert image.getpixel((20, 5))[0] > 200
    assert image.getpixel((20, 55))[0] < 50


def test_open_image_names_truncated_file(tmp_path: Path) -> None:
    path = truncate(write_image(tmp_path / "half.jpg", (9, 9, 9), size=(200, 200)))
    with pytest.raises(LightspineError, match=r"cannot read image .*half\.jpg: "):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0"])
def test_open_image_names_file_that_is_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(LightspineError, match=r"cannot read image .*bad\.jpg: it is not an image") as caught:
        open_image(path)
    assert caught.value.exit_status == 1


def test_open_image_refuses_small_image(tmp_path: Path) -> None:
    path = write_image(tmp_path / "tiny.png", (9, 9, 9), size=(20, 16))
    with pytest.raises(UsageError, match=r"tiny\.png is 20x16 px, at least 32x32 is needed"):
        open_image(path)


def test_open_image_refuses_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.png does not exist"):
        open_image(tmp_path / "gone.png")


def test_open_image_refuses_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_read_image_size_is_that_of_the_upright_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (64, 48)).save(path, exif=exif)
    image = open_image(path)
    assert read_image_size(path) == (image.height, image.width)


def test_open_image_does_not_run_postscript(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(LightspineError, match=r"a\.jpg: it is not an image"):
        open_image(tmp_path / "a.jpg")


def _jpeg(mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _without_jfif(data: bytes) -> bytes:
    """Remove the JFIF header, which follows the first two bytes, as many cameras do."""
    return data[:2] + data[4 + int.from_bytes(data[4:6]) :]


@pytest.mark.parametrize(
    "data",
    [
        _jpeg(),
        _jpeg("L"),
        _jpeg(subsampling="4:4:4"),
        _jpeg(progressive=True),
        _jpeg(exif=_exif(1)),
        _jpeg() + b"\0" * 8,
        _without_jfif(_jpeg()),
    ],
    ids=["4:2:0", "gray", "4:4:4", "progressive", "upright", "padded", "without JFIF"],
)
def test_size_of_jpeg_for_nvjpeg_is_that_of_the_header(data: bytes) -> None:
    assert find_nvjpeg_size(data, "a.jpg") == (48, 64)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        _png(),
        _jpeg("CMYK"),
        _jpeg(keep_rgb=True),
        _jpeg(exif=_exif(6)),
        _jpeg(exif=_exif(2)),
        _jpeg()[:-40],
        # Luma of a third of the resolution.
        _jpeg().replace(b"\x01\x22\x00", b"\x01\x31\x00"),
    ],
    ids=["png", "cmyk", "rgb", "turned", "mirrored", "truncated", "3x1"],
)
def test_other_images_are_left_to_pillow(data: bytes) -> None:
    assert find_nvjpeg_size(data, "a.jpg") is None


def test_nvjpeg_gets_no_small_image() -> None:
    with pytest.raises(UsageError, match=r"a\.jpg is 20x40 px, at least 32x32"):
        find_nvjpeg_size(_jpeg(size=(20, 40)), "a.jpg")


def test_nvjpeg_gets_no_image_above_the_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(LightspineError, match=r"a\.jpg: .*decompression bomb"):
        find_nvjpeg_size(_jpeg(), "a.jpg")


def test_nvjpeg_gets_no_other_file() -> None:
    with pytest.raises(LightspineError, match=r"a\.jpg: it is not an image"):
        find_nvjpeg_size(b"%!PS-Adobe-3.0 EPSF-3.0", "a.jpg")


def test_content_of_a_file_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "a.png", (9, 9, 9))
    assert read_image_file(path) == path.read_bytes()
    monkeypatch.setattr("lightspine.utils.image_files.MAX_IMAGE_BYTES", 100)
    with pytest.raises(LightspineError, match=r"a\.png: \d+ bytes exceed 100"):
        read_image_file(path)


def _progressive(width: int, height: int, scans: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:-2] + (scans * content[last:-2]) + content[-2:]


_ERRORS = (LightspineError, lightspine_runtime.LightspineError)


def _decoders() -> list[Callable[[bytes, str], Image.Image]]:
    return [decode_image, lightspine_runtime.images.decode_image]


@pytest.mark.parametrize("decode", _decoders(), ids=["library", "runtime"])
def test_small_file_that_decodes_its_pixels_thousands_of_times_is_refused(
    decode: Callable[[bytes, str], Image.Image],
) -> None:
    with pytest.raises(
        (LightspineError, lightspine_runtime.LightspineError), match="it decodes its 600x600 px"
    ):
        decode(_progressive(600, 600, 4000), "a.jpg")
    assert decode(_progressive(60, 60, 1), "a.jpg").size == (60, 60)


@pytest.mark.parametrize("decode", _decoders(), ids=["library", "runtime"])
def test_more_pixels_than_the_limit_are_refused(
    monkeypatch: pytest.MonkeyPatch, decode: Callable[[bytes, str], Image.Image]
) -> None:
    file = io.BytesIO()
    Image.new("L", (50, 50)).save(file, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(_ERRORS, match="more than 2,000 in all"):
        decode(file.getvalue(), "a.png")
