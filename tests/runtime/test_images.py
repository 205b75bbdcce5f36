"""`lightspine_runtime` decodes images exactly like the library, errors included."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lightspine_runtime.errors
import lightspine_runtime.images
from lightspine.errors import LightspineError
from lightspine.utils import image_files as images


def _save_all(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "rgb.png")
    for mode in ("L", "P", "RGBA", "LA", "1"):
        image.convert(mode).save(folder / f"{mode}.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    image.convert("P").save(folder / "transparent.png", transparency=b"\x00\xff")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)


def test_images_have_the_same_pixels(tmp_path: Path) -> None:
    _save_all(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 10
    for path in paths:
        expected, actual = images.open_image(path), lightspine_runtime.images.open_image(path)
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected), err_msg=path.name)


@pytest.mark.parametrize("name", ["absent.png", "text.png", "small.png", "float.tiff", "."])
def test_images_are_refused_with_the_same_message(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (20, 16)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((40, 40), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(LightspineError) as expected:
        images.open_image(tmp_path / name)
    with pytest.raises(lightspine_runtime.errors.LightspineError) as actual:
        lightspine_runtime.images.open_image(tmp_path / name)
    assert str(actual.value) == str(expected.value)
    assert actual.value.exit_status == expected.value.exit_status
