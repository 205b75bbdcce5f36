"""Image files: suffixes, listing and decoding to 8-bit RGB.

`lightspine_runtime` has its own copy of the decoder, because it is installed without this package.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lightspine.errors import LightspineError, UsageError
from lightspine.utils.issues import Issues

IMAGE_SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
"""Suffixes, in lower case, of the files that count as images in folders and shards."""

MIN_SIDE = 32
"""Smallest height and width of an image in pixels that the models accept."""

MAX_IMAGE_BYTES = 1 << 28
"""Largest image file that is read as a whole, in a shard or for the GPU: 256 MiB."""

# Values of the EXIF orientation that exchange height and width.
_QUARTER_TURNS = (5, 6, 7, 8)
# All values of the EXIF orientation that are not upright.
_TURNS = range(2, 9)
_END_OF_JPEG = b"\xff\xd9"
# Some programs append a few bytes to a JPEG.
_JPEG_TAIL = 64
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_SYSTEM_FOLDERS = frozenset(
    {"#recycle", "$recycle.bin", "@eadir", "__macosx", "lost+found", "system volume information"}
)
_SYSTEM_FILES = frozenset({"desktop.ini", "thumbs.db"})
_LISTED_ALREADY = "link to a file or folder that is listed already"

_log = logging.getLogger(__name__)

# Inside `ImageListing`, `list` is its method.
Names: TypeAlias = list[str]


def is_image_file(name: str) -> bool:
    """Return whether a file name has an image suffix and is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def is_visible_folder(name: str) -> bool:
    """Return whether a folder name is neither hidden nor that of an operating system's folder."""
    return not name.startswith(".") and name.lower() not in _SYSTEM_FOLDERS


def list_folders(folder: Path) -> list[str]:
    """Return the sorted names of the visible sub-folders of a folder."""
    return ImageListing(folder).list_folders(folder)


class ImageListing:
    """Listing of the images in the folders of a dataset, each image once.

    Symbolic links are followed, unless they lead to a file or folder that is listed already, which would put
    an image into two classes or splits or walk in a circle. The following are left out and counted: hidden
    files and folders, folders of operating systems (`__MACOSX`, `@eaDir`), files of other types, links to
    missing files and folders that cannot be read.

    Args:
        *roots: folders that are or contain all folders to list.

        repeat_links: list links to files even if these are listed already, such as one empty label map for
            many images.

    Attributes:
        left_out: number and first example of what was left out, by kind.
    """

    def __init__(self, *roots: str | Path, repeat_links: bool = False) -> None:
        self.roots = roots
        self.repeat_links = repeat_links
        self.left_out = Issues()
        self._real_roots = [os.path.realpath(root) for root in roots]
        self._folders: set[tuple[int, int]] = set()
        self._linked_files: set[str] = set()

    def walk(self, folder: str | Path) -> Iterator[str]:
        """Yield the paths of the images in a folder and its sub-folders, relative to the folder.

        The files of a folder come in sorted order before those of its sub-folders, which are visited in
        sorted order, so only one folder's names are held in memory.
        """
        pending = [""]
        while pending:
            inside = pending.pop()
            path = os.path.join(folder, inside) if inside else os.fspath(folder)
            if not self._enter(path):
                continue
            try:
                with os.scandir(path) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError:
                self.left_out.add("folder that cannot be read", path)
                continue
            prefix = f"{inside}/" if inside else ""
            folders = [entry for entry in entries if is_folder(entry)]
            pending += [prefix + entry.name for entry in reversed(folders) if self._accepts_folder(entry)]
            yield from (
                prefix + entry.name for entry in entries if not is_folder(entry) and self._accepts_file(entry)
            )

    def list(self, folder: str | Path) -> list[Path]:
        """Return the paths of the images in a folder and its sub-folders, sorted."""
        return sorted(Path(folder, name) for name in self.walk(folder))

    def list_folders(self, folder: str | Path) -> Names:
        """Return the sorted names of the visible sub-folders of a folder."""
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if is_folder(entry)), key=lambda entry: entry.name)
        return [entry.name for entry in found if self._is_visible(entry)]

    def report(self) -> None:
        """Log a warning that names what was left out, if there is anything."""
        if self.left_out:
            _log.warning("left out of %s: %s", " and ".join(map(str, self.roots)), self.left_out)

    def _enter(self, path: str) -> bool:
        """Return whether a folder is visited for the first time."""
        try:
            state = os.stat(path)
        except OSError:
            self.left_out.add("folder that cannot be read", path)
            return False
        key = (state.st_dev, state.st_ino)
        if key in self._folders:
            self.left_out.add(_LISTED_ALREADY, path)
            return False
        self._folders.add(key)
        return True

    def _is_visible(self, entry: os.DirEntry[str]) -> bool:
        """Return whether a folder is visible; count it if not."""
        if is_visible_folder(entry.name):
            return True
        kind = "hidden folder" if entry.name.startswith(".") else "folder of the operating system"
        self.left_out.add(kind, entry.path)
        return False

    def _accepts_folder(self, entry: os.DirEntry[str]) -> bool:
        if not self._is_visible(entry):
            return False
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            contains_root = any(_path_below(root, real) is not None for root in self._real_roots)
            if contains_root or self._is_listed(real):
                self.left_out.add(_LISTED_ALREADY, entry.path)
                return False
        return True

    def _accepts_file(self, entry: os.DirEntry[str]) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix not in IMAGE_SUFFIXES:
            if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FILES:
                self.left_out.add(
                    f"file with the suffix {suffix}" if suffix else "file without a suffix", entry.path
                )
            return False
        if entry.name.startswith("."):
            self.left_out.add("hidden file", entry.path)
            return False
        if not _is_regular(entry):
            self.left_out.add("link to a missing file" if entry.is_symlink() else "special file", entry.path)
            return False
        if entry.is_symlink() and not self.repeat_links:
            real = os.path.realpath(entry.path)
            listed = is_image_file(os.path.basename(real)) and self._is_listed(real)
            if listed or real in self._linked_files:
                self.left_out.add(_LISTED_ALREADY, entry.path)
                return False
            self._linked_files.add(real)
        return True

    def _is_listed(self, real: str) -> bool:
        """Return whether a file or folder is listed without a link: it is below a root, and not hidden."""
        for root in self._real_roots:
            inside = _path_below(real, root)
            if inside is not None and all(map(is_visible_folder, inside)):
                return True
        return False


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; links in a circle are not."""
    # The operating system follows a circle of links to its end, which is an error.
    with suppress(OSError):
        return entry.is_dir()
    return False


def _is_regular(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_file()
    return False


def list_image_files(folder: str | Path) -> list[Path]:
    """Return the paths of the images in a folder and its sub-folders, sorted; see `ImageListing`.

    What was left out is logged.
    """
    listing = ImageListing(folder)
    files = listing.list(folder)
    listing.report()
    return files


def expand_image_paths(paths: Iterable[str | Path]) -> list[Path]:
    """List image files; a folder is replaced by the images in it and its sub-folders, sorted.

    Every file is listed once, however often it is given. What was left out of folders is logged.

    Raises:
        UsageError: the list is empty, or a folder contains no images.
    """
    given = list(map(Path, paths))
    listing = ImageListing(*(path for path in given if path.is_dir()))
    files: dict[Path, None] = {}
    for path in given:
        repeated = listing.left_out.counts[_LISTED_ALREADY]
        found = listing.list(path) if path.is_dir() else [path]
        if not found and listing.left_out.counts[_LISTED_ALREADY] == repeated:
            raise UsageError(f"expected images in the folder {path}, found none")
        files |= dict.fromkeys(found)
    listing.report()
    if not files:
        raise UsageError("expected at least one image or folder of images, got none")
    return list(files)


def _path_below(path: str, folder: str) -> list[str] | None:
    """Return the parts of a real path below a real folder, [] for the folder itself, or None."""
    if path == folder:
        return []
    prefix = folder.rstrip(os.sep) + os.sep
    return path[len(prefix) :].split(os.sep) if path.startswith(prefix) else None


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright; see `decode_image`.

    Args:
        path: file of a raster format that Pillow reads.

    Raises:
        UsageError: the file does not exist, or the image is smaller than 32 px on a side.
        LightspineError: the file is not an image, is truncated, or has pixels of an unsupported type.
    """
    path = Path(path)
    with _open_file(path) as file:
        return decode_image(file, str(path))


def read_image_file(path: str | Path) -> bytes:
    """Read the content of an image file.

    Raises:
        UsageError: the file does not exist.
        LightspineError: it cannot be read or is larger than 256 MiB.
    """
    path = Path(path)
    with _open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_IMAGE_BYTES:
            raise LightspineError(f"cannot read image {path}: {size} bytes exceed {MAX_IMAGE_BYTES}")
        return file.read()


@contextmanager
def _open_file(path: Path) -> Iterator[BinaryIO]:
    if not path.is_file():
        raise UsageError(
            f"expected an image file, but {path} {'is a folder' if path.is_dir() else 'does not exist'}"
        )
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise LightspineError(f"cannot read image {path}: {error.strerror or error}") from error


def decode_image(data: bytes | BinaryIO, name: str) -> Image.Image:
    """Decode an image to 8-bit RGB, upright.

    Gray, palette, CMYK and 16-bit images are converted (16-bit values are scaled, not clipped), transparency
    is dropped, and the EXIF orientation is applied.

    Args:
        data: content of an image file, or the open file.
        name: name of the image in error messages.

    Raises:
        UsageError: the image is smaller than 32 px on a side.
        LightspineError: it is not an image, is truncated, or has pixels of an unsupported type.
    """
    with open_upright(data, f"image {name}") as upright:
        image = _convert_to_rgb(upright)
    _check_side(*image.size, name)
    return image


def _check_side(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise UsageError(f"image {name} is {width}x{height} px, at least {MIN_SIDE}x{MIN_SIDE} is needed")


# Scans of a progressive JPEG that may cover so many pixels in all; encoders write up to fifteen scans.
_USUAL_SCANS, _MOST_SCANNED = 16, 2**30


def _check_pixels(file: Image.Image) -> None:
    """Check the number of pixels; Pillow only warns up to twice its limit."""
    width, height = file.size
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(f"it has {width}x{height} px, more than {most:,} in all")


def _check_scans(file: Any) -> None:
    """Check that a progressive JPEG of a few bytes does not decode its pixels thousands of times."""
    if not (file.info.get("progressive") or file.info.get("progression")):
        return
    width, height = file.size
    at = file.fp.tell()
    file.fp.seek(0)
    scans = file.fp.read().count(b"\xff\xda")
    file.fp.seek(at)
    if scans > _USUAL_SCANS and scans * width * height > _MOST_SCANNED:
        raise ValueError(f"it decodes its {width}x{height} px {scans:,} times")


@contextmanager
def open_upright(data: bytes | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Open an image of any mode and apply its EXIF orientation; label maps are turned like their images.

    Args:
        data: content of an image file, or the open file.
        name: kind and name of the image in error messages.

    Raises:
        LightspineError: it is not an image or is truncated, or a ValueError is raised inside the block.
    """
    with _open(data, name) as file:
        _check_scans(file)
        # A conversion may drop the EXIF block that holds the orientation, so rotate first.
        ImageOps.exif_transpose(file, in_place=True)
        yield file


@contextmanager
def _open(data: bytes | BinaryIO | str | Path, name: str) -> Iterator[Image.Image]:
    """Open an image in one of the accepted formats without decoding it; the only call of Pillow's opener.

    Raises:
        LightspineError: it is not an image or has too many pixels, or an error is raised inside the block.
    """
    try:
        # Pillow warns about harmless damage, such as an invalid EXIF block.
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats()) as file,
        ):
            _check_pixels(file)
            yield file
    # Pillow's decoders raise many types on damaged data: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise LightspineError(f"cannot read {name}: {reason or type(error).__name__}") from error


def read_image_size(path: str | Path) -> tuple[int, int]:
    """Return the height and width of an image file as `open_image` returns it, without decoding the pixels.

    Raises:
        LightspineError: the file is missing or not an image.
    """
    with _open(path, f"image {path}") as file:
        width, height = file.size
        # Pillow reports the upright size of a TIFF.
        orientation = None if file.format == "TIFF" else file.getexif().get(ExifTags.Base.Orientation)
    return (width, height) if orientation in _QUARTER_TURNS else (height, width)


def find_nvjpeg_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Return the height and width of a JPEG that nvJPEG decodes to Pillow's image; `None` for other images.

    Only the header is read. Left to Pillow are: other formats, CMYK, colors stored as RGB, an unusual chroma
    subsampling, an EXIF orientation, and files that do not end as a JPEG should, because nvJPEG may decode a
    truncated file without an error.

    Args:
        data: content of an image file.
        name: name of the image in error messages.

    Raises:
        UsageError: the image is smaller than 32 px on a side.
        LightspineError: it is not an image, or has too many pixels.
    """
    with _open(data, f"image {name}") as file:
        _check_scans(file)
        if file.format != "JPEG" or _END_OF_JPEG not in data[-_JPEG_TAIL:] or not _is_plain_jpeg(file):
            return None
        width, height = file.size
    _check_side(width, height, name)
    return height, width


def _is_plain_jpeg(file: Any) -> bool:
    """Return whether an opened JPEG is upright, gray or YCbCr, with chroma of full or half resolution."""
    if file.getexif().get(ExifTags.Base.Orientation) in _TURNS:
        return False
    if file.layers == 1:
        return True
    if len(file.layer) != 3:
        return False
    numbers, across, down, _ = zip(*file.layer, strict=True)
    # libjpeg's rule for the color space: a JFIF header, else Adobe's marker, else the component numbers.
    transform = file.info.get("adobe_transform")
    is_ycbcr = "jfif" in file.info or transform == 1 or (transform is None and numbers == (1, 2, 3))
    return is_ycbcr and across[0] in (1, 2) and down[0] in (1, 2) and {*across[1:], *down[1:]} == {1}


@cache
def _formats() -> tuple[str, ...]:
    """Return the raster formats that this Pillow reads; its EPS reader starts Ghostscript."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255, which turns most pixels white.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"expected integer pixels from 0 to 65535, got {values.min()} to {values.max()}")
        return Image.fromarray((values // values.dtype.type(257)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("expected integer pixels, got floating-point ones")
    if image.mode == "P" and "transparency" in image.info:
        # A palette with an alpha value per color must become RGBA before alpha can be dropped.
        image = image.convert("RGBA")
    return image.convert("RGB")
