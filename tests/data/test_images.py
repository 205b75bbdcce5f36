"""Whatever an image file holds, it comes out as upright 8-bit RGB or as a sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightspine.data import open_image
from lightspine.errors import LightspineError, UsageError
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
