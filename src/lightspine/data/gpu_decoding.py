"""JPEG decoding on the GPU: nvJPEG, through torchvision, with the training augmentation on the device.

The workers read the files, check their headers and draw the random augmentation. The device decodes, crops,
flips, changes the colors and normalizes. Images that nvJPEG does not decode as Pillow does are decoded and
augmented in the workers.
"""

import io
import logging
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomHorizontalFlip

from lightspine.data.bad_images import BadImage
from lightspine.data.dataset import Batch, EncodedImageSource, SourceDataset
from lightspine.data.transforms import (
    Augmentation,
    AugmentationName,
    Preprocessing,
    create_batch_normalization,
    create_train_transform,
    resolve_augmentation,
)
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import decode_image, find_nvjpeg_size

DecodeDevice = Literal["cpu", "cuda"]
DECODE_DEVICES: tuple[DecodeDevice, ...] = get_args(DecodeDevice)

MAX_PIXELS_PER_CALL = 1 << 26
"""Largest number of pixels that are decoded together, so that photographs do not fill the device: 200 MB."""

_FILTERS = ("bilinear", "bicubic")
# Pixels of the input on both sides of a pixel of the output that a filter reads where nothing shrinks.
_FILTER_RADIUS = {"bilinear": 1.0, "bicubic": 2.0}
# PyTorch's resize on CUDA keeps the weights of a block of 32 pixels in shared memory: 48 KiB of float32.
_SHARED_NUMBERS, _BLOCK_PIXELS = 48 * 1024 // 4, 32
_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
# ITU-R 601-2, as in Pillow's conversion to gray.
_GRAY = (0.299, 0.587, 0.114)

_log = logging.getLogger(__name__)


class Jpeg(NamedTuple):
    """JPEG of a batch with its random augmentation.

    Attributes:
        name: name in messages, such as the path.
        length: number of bytes.
        size: height and width in pixels.
        box: crop as (top, left, height, width).
        interpolation: filter of the resize, "bilinear" or "bicubic".
        flip: whether to flip it horizontally.
        jitter: changes of color in their order, as (0 brightness, 1 contrast or 2 saturation, factor).
    """

    name: str
    length: int
    size: tuple[int, int]
    box: tuple[int, int, int, int]
    interpolation: str
    flip: bool
    jitter: tuple[tuple[int, float], ...]


class EncodedItem(NamedTuple):
    """One image with its class: a JPEG with its content, augmented uint8 pixels (3, H, W), or nothing."""

    jpeg: Jpeg | None
    content: bytes | Tensor | None
    label: int
    bad: tuple[BadImage, ...] = ()


class EncodedBatch(NamedTuple):
    """Batch of N images, of which the first J are JPEGs.

    Attributes:
        data: content of the JPEGs, one after the other, uint8.
        jpegs: their augmentation.
        pixels: (N - J, 3, H, W), uint8: images that were decoded and augmented by the workers.
        labels: (N,), int64.
        bad: images that were skipped, as reported by the workers.
    """

    data: Tensor
    jpegs: list[Jpeg]
    pixels: Tensor
    labels: Tensor
    bad: list[BadImage]

    def pin_memory(self) -> "EncodedBatch":
        """Pin the tensors; called by DataLoader, which would otherwise rebuild the tuple of every JPEG."""
        return self._replace(
            data=self.data.pin_memory(), pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory()
        )


class EncodedImageDataset(SourceDataset[EncodedItem]):
    """Map-style training dataset whose JPEGs are not decoded.

    A bad image is replaced by the next readable one.

    Args:
        source: the images.
        transform: the `transform` of a `JpegDecoder`.
    """

    source: EncodedImageSource

    def __init__(self, source: EncodedImageSource, transform: Any) -> None:
        super().__init__(source, replace_bad=True)
        self.transform = transform

    def read(self, position: int) -> tuple[bytes, tuple[int, int]] | Image.Image:
        """Read the encoded bytes and the size of a JPEG that the GPU decodes, or decode another image."""
        data, name = self.source.read(position), self.source.name(position)
        size = find_nvjpeg_size(data, name)
        return decode_image(data, name) if size is None else (data, size)

    def make_item(self, position: int, content: Any, bad: tuple[BadImage, ...]) -> EncodedItem:
        """Return a JPEG with random augmentation parameters, or another image augmented."""
        if content is None:
            return EncodedItem(None, None, -1, bad)
        label = int(self.source.labels[position])
        if isinstance(content, Image.Image):
            return EncodedItem(None, self.transform(content), label, bad)
        data, size = content
        return EncodedItem(
            draw_augmentation(self.transform, self.image_name(position), data, size), data, label, bad
        )


def draw_augmentation(transform: Any, name: str, data: bytes, size: tuple[int, int]) -> Jpeg:
    """Draw the random augmentation of a JPEG from the global generators, as the transform would.

    Args:
        transform: the `transform` of a `JpegDecoder`.
        name: name of the image.
        data: its content.
        size: its height and width.
    """
    crop, *steps = transform.transforms
    box = crop.get_params(torch.empty(1, *size, device="meta"), crop.scale, crop.ratio)
    modes = crop.interpolation
    interpolation = random.choice(modes) if isinstance(modes, Sequence) else modes
    flip, jitter = False, list[tuple[int, float]]()
    for step in steps:
        if isinstance(step, RandomHorizontalFlip):
            flip = bool(torch.rand(1) < step.p)
        elif isinstance(step, ColorJitter):
            order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
            jitter = [(kind, factors[kind]) for kind in order.tolist() if factors[kind] is not None]
    return Jpeg(name, len(data), size, box, interpolation.value, flip, tuple(jitter))


def collate_encoded(items: Sequence[EncodedItem]) -> EncodedBatch:
    """Collate items into a batch, the JPEGs first; items without an image are left out."""
    jpegs = [item for item in items if item.jpeg is not None]
    others = [item for item in items if isinstance(item.content, Tensor)]
    pixels = [item.content for item in others if isinstance(item.content, Tensor)]
    data = bytearray().join(item.content for item in jpegs if isinstance(item.content, bytes))
    return EncodedBatch(
        torch.from_numpy(np.frombuffer(data, dtype=np.uint8)),
        [item.jpeg for item in jpegs if item.jpeg is not None],
        torch.stack(pixels) if pixels else torch.empty(0),
        torch.tensor([item.label for item in (*jpegs, *others)], dtype=torch.int64),
        [bad for item in items for bad in item.bad],
    )


def check_augmentation(
    preprocessing: Preprocessing, augmentation: AugmentationName | Augmentation
) -> Augmentation:
    """Return the settings of an augmentation that the device can do: resized crop, flip and color jitter.

    Raises:
        UsageError: another augmentation, which needs Pillow.
    """
    settings = Augmentation() if augmentation == "none" else resolve_augmentation(augmentation)
    interpolation = settings.interpolation or preprocessing.interpolation
    problem = None
    if augmentation == "none":
        problem = "augmentation=none"
    elif settings.auto_augment:
        problem = f"auto_augment={settings.auto_augment}"
    elif settings.crop != "resized":
        problem = f"crop={settings.crop}"
    elif settings.erasing and not settings.erasing_after_mixing:
        problem = f"erasing={settings.erasing:g} without erasing_after_mixing"
    elif interpolation not in (*_FILTERS, "random"):
        problem = f"interpolation={interpolation}"
    if problem is not None:
        raise UsageError(
            "with decode=cuda, the augmentation may consist of a resized crop (bilinear or bicubic), flips "
            f"and color jitter, as light and medium do, got {problem}"
        )
    return settings


class JpegDecoder:
    """Decodes and augments the batches of an `EncodedImageDataset` on the device of the training.

    A JPEG that the device refuses is decoded by Pillow; one that Pillow refuses too is reported as bad and
    replaced by the next image of the batch.

    Args:
        preprocessing: input size and statistics of the model.
        augmentation: see `check_augmentation`.
        device_type: "cuda" (nvJPEG), or "cpu" (libjpeg-turbo in the training process, for tests).

    Attributes:
        transform: transform of the workers, from which they also draw the augmentation of the JPEGs.

    Raises:
        UsageError: there is no CUDA device, torchvision has no decoder, or the device cannot do the
            augmentation.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        augmentation: AugmentationName | Augmentation,
        *,
        device_type: DecodeDevice = "cuda",
    ) -> None:
        settings = check_augmentation(preprocessing, augmentation)
        if device_type == "cuda" and not torch.cuda.is_available():
            raise UsageError("decode=cuda needs a CUDA device, but PyTorch finds none")
        try:
            from torchvision.io import ImageReadMode, decode_jpeg
        except ImportError as error:
            raise UsageError(
                "decode=cuda needs torchvision.io.decode_jpeg, which torchvision "
                f"{torchvision.__version__} lacks"
            ) from error
        self._decode_jpeg, self._mode = decode_jpeg, ImageReadMode.RGB
        # Without normalization, which the device does.
        self.transform = create_train_transform(preprocessing, replace(settings, erasing_after_mixing=True))
        self.device_type = device_type
        self._size = preprocessing.input_size[1:]
        # Mixup and CutMix come before the normalization if the erasing comes after them.
        self._normalize = None if settings.erasing_after_mixing else create_batch_normalization(preprocessing)
        self._streams: dict[torch.device, Any] = {}
        self._refused = False

    def __call__(self, batch: EncodedBatch, device: torch.device) -> Batch:
        """Decode and augment a batch on the device; float32, or uint8 if it is normalized later.

        Raises:
            UsageError: the device is not of the expected type, or torchvision cannot decode on it.
        """
        if device.type != self.device_type:
            raise UsageError(f"decode={self.device_type} expects training on such a device, got {device}")
        if device.type != "cuda":
            return self._process(batch, device)
        # torchvision decodes on a stream of its own, which does not wait for ours, and nvJPEG's hardware
        # engine waits for no stream. So the decoder may only get memory that no queued kernel still reads:
        # that of a stream which is used for nothing else, and which `_decode_together` waits for. Waiting for
        # the training's stream instead would keep the host from preparing the next step.
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, current = self._streams[device], torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            result = self._process(batch, device)
        current.wait_stream(stream)
        for tensor in (result.images, result.labels):
            tensor.record_stream(current)
        return result

    def _process(self, batch: EncodedBatch, device: torch.device) -> Batch:
        # Copied before the decoder waits for the stream.
        labels = batch.labels.to(device, non_blocking=True)
        pixels = batch.pixels.to(device, torch.float32, non_blocking=True)
        images = torch.zeros(len(batch.jpegs), 3, *self._size, device=device)
        bad, refused = list(batch.bad), set()
        for start, files in _groups(batch):
            decoded = self._decode(files, batch.jpegs[start : start + len(files)], device, bad)
            for row, image in enumerate(decoded, start):
                if image is None:
                    refused.add(row)
                else:
                    images[row] = _resized_crop(image, batch.jpegs[row], self._size)
        images = _augment(images, batch.jpegs)
        if len(pixels):
            images = torch.cat([images, pixels])
        if refused:
            kept = _replace_rows(len(images), refused).to(device)
            images, labels = images[kept], labels[kept]
        images = images.to(torch.uint8) if self._normalize is None else self._normalize(images)
        return Batch(images, labels, bad)

    def _decode(
        self, files: Sequence[Tensor], jpegs: Sequence[Jpeg], device: torch.device, bad: list[BadImage]
    ) -> list[Tensor | None]:
        """Decode JPEGs to uint8 tensors (3, H, W) on the device; `None` for corrupt files."""
        decoded: Sequence[Tensor | None]
        try:
            decoded = self._decode_together(files, device)
        except RuntimeError as error:
            if len(files) > 1:
                # One JPEG that is refused fails the whole call.
                alone = [
                    self._decode([file], [jpeg], device, bad) for file, jpeg in zip(files, jpegs, strict=True)
                ]
                return [image for (image,) in alone]
            self._report_refused(jpegs[0].name, device, error)
            decoded = [None]
        return [
            image
            # A crafted file may have a size for each decoder.
            if image is not None and image.shape[1:] == jpeg.size
            else self._decode_by_pillow(file, jpeg, device, bad)
            for file, jpeg, image in zip(files, jpegs, decoded, strict=True)
        ]

    def _decode_by_pillow(
        self, file: Tensor, jpeg: Jpeg, device: torch.device, bad: list[BadImage]
    ) -> Tensor | None:
        try:
            image = decode_image(file.numpy().tobytes(), jpeg.name)
        except LightspineError as error:
            bad.append(BadImage(jpeg.name, str(error)))
            return None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)

    def _decode_together(self, files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Decode a batch of JPEGs with torchvision's `decode_jpeg`.

        Raises:
            RuntimeError: a JPEG is refused.
        """
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        try:
            with warnings.catch_warnings():
                # Deprecated since torchvision 0.29, in favor of TorchCodec.
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                return self._decode_jpeg(list(files), self._mode, device)
        except RuntimeError:
            if device.type == "cuda":
                # The call may have left kernels behind that write to memory which is free now.
                torch.cuda.synchronize(device)
            raise

    def _report_refused(self, name: str, device: torch.device, error: RuntimeError) -> None:
        """Warn once about a JPEG that the device cannot decode.

        Raises:
            UsageError: the device does not even decode a valid JPEG.
        """
        if self._refused:
            return
        self._refused = True
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, "JPEG")
        try:
            self._decode_together([torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)], device)
        except RuntimeError as failure:
            raise UsageError(
                f"decode={self.device_type} needs a torchvision that decodes JPEGs on {device}, but version "
                f"{torchvision.__version__} reports: {_first_line(failure)}"
            ) from failure
        _log.warning(
            "JPEGs that %s refuses are decoded by Pillow, first %s: %s", device, name, _first_line(error)
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _groups(batch: EncodedBatch) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Split a batch by number of pixels; yield the position of the first JPEG and the files of a group."""
    files = batch.data.split([jpeg.length for jpeg in batch.jpegs])
    start = pixels = 0
    for row, jpeg in enumerate(batch.jpegs):
        count = jpeg.size[0] * jpeg.size[1]
        if row > start and pixels + count > MAX_PIXELS_PER_CALL:
            yield start, files[start:row]
            start, pixels = row, 0
        pixels += count
    if batch.jpegs:
        yield start, files[start:]


def _resized_crop(image: Tensor, jpeg: Jpeg, size: Sequence[int]) -> Tensor:
    """Crop and resize an image (3, H, W); the filter is Pillow's, which widens when it shrinks an image."""
    top, left, height, width = jpeg.box
    crop = image[None, :, top : top + height, left : left + width]
    if image.is_cuda and not _fits_resize_on_cuda(jpeg, size):
        crop = crop.cpu()
    resized = F.interpolate(crop.to(torch.float32), tuple(size), mode=jpeg.interpolation, antialias=True)[0]
    return resized.to(image.device)


def _fits_resize_on_cuda(jpeg: Jpeg, size: Sequence[int]) -> bool:
    """Return whether PyTorch's antialiased resize on CUDA supports the scale of a crop.

    It fails beyond a factor of about 94 (bilinear) or 47 (bicubic), such as for a photograph of 4,000 pixels
    that becomes one of 32 pixels.
    """
    rows, columns = (
        2 * math.ceil(_FILTER_RADIUS[jpeg.interpolation] * max(given / wanted, 1.0)) + 1
        for given, wanted in zip(jpeg.box[2:], size, strict=True)
    )
    return columns * _BLOCK_PIXELS + rows * (_BLOCK_PIXELS + 1) <= _SHARED_NUMBERS


def _augment(images: Tensor, jpegs: Sequence[Jpeg]) -> Tensor:
    """Flip images (N, 3, H, W) and change their colors; values from 0 to 255, rounded after every step."""
    images = images.round().clamp_(0, 255)
    if not jpegs:
        return images
    flips = torch.tensor([jpeg.flip for jpeg in jpegs])[:, None, None, None].to(
        images.device, non_blocking=True
    )
    images = torch.where(flips, images.flip(3), images)
    if not jpegs[0].jitter:
        return images
    gray = torch.tensor(_GRAY)[:, None, None].to(images.device, non_blocking=True)
    # (steps, N, kind and factor): the order of the changes differs from image to image.
    for step in (
        torch.tensor([jpeg.jitter for jpeg in jpegs]).transpose(0, 1).to(images.device, non_blocking=True)
    ):
        kind, factor = step[:, :, None, None, None].unbind(1)
        # Pillow blends with black, with the mean gray value, or with the gray image, in whole numbers.
        luma = (images * gray).sum(1, keepdim=True).add_(0.5).floor_()
        mean = luma.mean((2, 3), keepdim=True).add_(0.5).floor_()
        other = torch.where(kind == _CONTRAST, mean, luma) * (kind != _BRIGHTNESS)
        images = (other + factor * (images - other)).clamp_(0, 255).floor_()
    return images


def _replace_rows(count: int, refused: set[int]) -> Tensor:
    """Return the rows of a batch with every refused row replaced by the next other one."""
    kept = [row for row in range(count) if row not in refused]
    return torch.tensor(
        [next((other for other in kept if other >= row), kept[0]) for row in range(count)] if kept else [],
        dtype=torch.int64,
    )
