"""JPEG decoding on the device of the training: images as from the workers, damaged and refused files.

The same code runs with torchvision's CPU decoder here, and with nvJPEG in the tests marked `gpu`.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightspine.data import (
    Augmentation,
    Batch,
    FileSource,
    ImageDataset,
    Preprocessing,
    Sample,
    SeededDataset,
    gpu_decoding,
)
from lightspine.data.dataset import collate_images
from lightspine.data.gpu_decoding import (
    EncodedBatch,
    EncodedImageDataset,
    Jpeg,
    JpegDecoder,
    collate_encoded,
)
from lightspine.data.modules import ImageFolderDataModule
from lightspine.data.transforms import create_train_transform
from lightspine.errors import LightspineError, UsageError
from support.images import truncate, write_folder
from support.training import make_trainer

SMALL = Preprocessing(input_size=(3, 48, 48))
CROP = Augmentation(auto_augment=None, color_jitter=0.0, erasing=0.0)
# Warnings between Lightning and torch, and about num_workers.
quiet = pytest.mark.filterwarnings(
    "ignore:`isinstance:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:.*`train_dataloader` from",
)

on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _picture(seed: int, width: int = 150, height: int = 110) -> Image.Image:
    """Return a picture with soft edges and noise; every crop of it, flipped or not, is different."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    noise = rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def _encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _write(folder: Path, files: list[bytes]) -> FileSource:
    """Write images; the class of an image is its position."""
    paths = [folder / f"{number}.jpg" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return FileSource([Sample(path, number) for number, path in enumerate(paths)])


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    pictures = [_picture(seed, width=100 + 10 * seed) for seed in range(8)]
    files = [_encode(picture, quality=80 + number) for number, picture in enumerate(pictures)]
    return _write(
        tmp_path, [*files, _encode(pictures[0].convert("L")), _encode(pictures[1], progressive=True)]
    )


def _encoded(source: FileSource, decoder: JpegDecoder) -> EncodedBatch:
    dataset = SeededDataset(EncodedImageDataset(source, decoder.transform), seed=3)
    return collate_encoded([dataset[number] for number in range(len(source))])


def _by_workers(source: FileSource, augmentation: Any) -> Batch:
    dataset = ImageDataset(source, create_train_transform(SMALL, augmentation), replace_bad=True)
    seeded = SeededDataset(dataset, seed=3)
    return collate_images([seeded[number] for number in range(len(source))])


def _decoder(augmentation: Any = CROP, device: Any = "cpu") -> JpegDecoder:
    return JpegDecoder(SMALL, augmentation, device_type=device)


def _decode(source: FileSource, augmentation: Any = CROP, device: str = "cpu") -> Batch:
    decoder = _decoder(augmentation, torch.device(device).type)
    return decoder(_encoded(source, decoder), torch.device(device))


def _differences(images: Tensor, expected: Tensor) -> Tensor:
    """Return the absolute differences in units of the 8-bit values."""
    return (images.cpu() - expected).abs() * 255 * torch.tensor(SMALL.std)[:, None, None]


AUGMENTATIONS = [
    "light",
    "medium",
    CROP,
    Augmentation(auto_augment=None, color_jitter=0.4, erasing=0.0, interpolation="random", hflip=0.9),
]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["light", "medium", "crop", "random"])
def test_images_are_those_of_the_workers(source: FileSource, augmentation: Any) -> None:
    batch, expected = _decode(source, augmentation), _by_workers(source, augmentation)
    assert torch.equal(batch.labels, expected.labels)
    differences = _differences(batch.images, expected.images)
    # Pillow rounds between the two directions of a resize. Another crop, flip or color differs by 10 or more.
    assert differences.mean((1, 2, 3)).max() < 1
    assert differences.max() < 20


def test_images_stay_uint8_if_they_are_normalized_after_mixing(source: FileSource) -> None:
    augmentation = Augmentation(auto_augment=None, erasing=0.5, erasing_after_mixing=True)
    batch, expected = _decode(source, augmentation), _by_workers(source, augmentation)
    assert batch.images.dtype == torch.uint8
    assert (batch.images.float() - expected.images.float()).abs().mean() < 1


def _adobe_rgb(image: Image.Image) -> bytes:
    return _encode(image, keep_rgb=True)


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encode(image, exif=exif)


@pytest.mark.parametrize(
    "encode",
    [
        lambda image: _encode(image, "PNG"),
        lambda image: _encode(image.convert("CMYK")),
        _adobe_rgb,
        _turned,
    ],
    ids=["png", "cmyk", "rgb", "turned"],
)
def test_other_images_are_decoded_by_the_workers(
    tmp_path: Path, encode: Callable[[Image.Image], bytes]
) -> None:
    source = _write(tmp_path, [encode(_picture(0)), encode(_picture(1))])
    decoder = _decoder("medium")
    encoded = _encoded(source, decoder)
    assert not encoded.jpegs
    images = decoder(encoded, torch.device("cpu")).images
    assert torch.allclose(images, _by_workers(source, "medium").images, atol=1e-5)


def test_jpegs_of_a_mixed_batch_come_first_with_their_labels(tmp_path: Path) -> None:
    source = _write(
        tmp_path, [_encode(_picture(0), "PNG"), _encode(_picture(1)), _encode(_picture(2), "PNG")]
    )
    batch, expected = _decode(source), _by_workers(source, CROP)
    assert batch.labels.tolist() == [1, 0, 2]
    assert _differences(batch.images, expected.images[[1, 0, 2]]).mean((1, 2, 3)).max() < 1


def test_batch_is_pinned_without_rebuilding_the_jpegs(
    source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _encoded(source, _decoder())
    # Without a CUDA device, memory cannot be pinned.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 0)
    pinned = batch.pin_memory()
    assert pinned.jpegs is batch.jpegs
    assert pinned.data is not batch.data
    assert torch.equal(pinned.data, batch.data)
    assert torch.equal(pinned.labels, batch.labels)


def test_truncated_jpeg_is_replaced_by_the_next_as_in_the_workers(source: FileSource) -> None:
    truncate(Path(source.name(2)))
    batch, expected = _decode(source), _by_workers(source, CROP)
    assert batch.labels.tolist() == expected.labels.tolist() == [0, 1, 3, *range(3, 10)]
    assert batch.bad == expected.bad


def _without_quantization_tables(data: bytes) -> bytes:
    """Return a JPEG with a valid header and end, whose decoding fails."""
    return data.replace(b"\xff\xdb", b"\xff\xfe")


def test_jpeg_that_fails_to_decode_is_named_and_replaced(source: FileSource) -> None:
    path = Path(source.name(4))
    path.write_bytes(_without_quantization_tables(path.read_bytes()))
    batch = _decode(source)
    assert batch.labels.tolist() == [*range(4), 5, *range(5, 10)]
    assert torch.equal(batch.images[4], batch.images[5])
    assert [bad.path for bad in batch.bad] == [str(path)]
    assert "4.jpg" in batch.bad[0].reason


def test_last_jpeg_that_fails_is_replaced_by_the_first(source: FileSource) -> None:
    path = Path(source.name(9))
    path.write_bytes(_without_quantization_tables(path.read_bytes()))
    assert _decode(source).labels.tolist() == [*range(9), 0]


def test_batch_without_a_readable_image_is_empty(tmp_path: Path) -> None:
    source = _write(tmp_path, [_without_quantization_tables(_encode(_picture(seed))) for seed in range(2)])
    batch = _decode(source)
    assert len(batch.images) == len(batch.labels) == 0
    assert len(batch.bad) == 2


def test_jpeg_that_the_device_alone_refuses_is_decoded_by_pillow(
    source: FileSource, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = _decoder()
    decode, refused = decoder._decode_jpeg, Path(source.name(3)).read_bytes()

    def refuse(files: list[Tensor], *arguments: Any) -> list[Tensor]:
        if any(bytes(file.numpy()) == refused for file in files):
            raise RuntimeError("nvjpegDecode failed: 6\nat line 7")
        return decode(files, *arguments)

    decoder._decode_jpeg = refuse
    batch = decoder(_encoded(source, decoder), torch.device("cpu"))
    assert batch.labels.tolist() == list(range(10))
    assert not batch.bad
    assert _differences(batch.images, _by_workers(source, CROP).images).mean((1, 2, 3)).max() < 1
    assert [record.getMessage() for record in caplog.records] == [
        f"JPEGs that cpu refuses are decoded by Pillow, first {source.name(3)}: nvjpegDecode failed: 6"
    ]


def test_device_that_decodes_no_jpeg_is_named(source: FileSource) -> None:
    decoder = _decoder()

    def fail(*_: Any) -> list[Tensor]:
        raise RuntimeError("torchvision not compiled with nvJPEG support")

    decoder._decode_jpeg = fail
    with pytest.raises(UsageError, match=r"decodes JPEGs on cpu, but version .* not compiled with nvJPEG"):
        decoder(_encoded(source, decoder), torch.device("cpu"))


def test_large_images_are_decoded_in_several_calls(
    source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _decode(source).images
    monkeypatch.setattr(gpu_decoding, "MAX_PIXELS_PER_CALL", 40_000)
    decoder = _decoder()
    decode, calls = decoder._decode_jpeg, list[int]()

    def count(files: list[Tensor], *arguments: Any) -> list[Tensor]:
        calls.append(len(files))
        return decode(files, *arguments)

    decoder._decode_jpeg = count
    assert torch.equal(decoder(_encoded(source, decoder), torch.device("cpu")).images, expected)
    assert sum(calls) == 10
    assert 1 < len(calls) < 10


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ("strong", "got auto_augment=rand-m9"),
        ("none", "got augmentation=none"),
        (Augmentation(auto_augment=None), r"got erasing=0\.25 without erasing_after_mixing"),
        (Augmentation(auto_augment=None, erasing=0.0, crop="padded"), "got crop=padded"),
    ],
)
def test_augmentations_of_pillow_are_refused(augmentation: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _decoder(augmentation)


def test_filters_of_pillow_are_refused() -> None:
    with pytest.raises(UsageError, match=r"bilinear or bicubic.* got interpolation=lanczos"):
        JpegDecoder(Preprocessing(interpolation="lanczos"), "light", device_type="cpu")


def test_training_on_another_device_is_refused(source: FileSource) -> None:
    decoder = _decoder()
    with pytest.raises(UsageError, match="decode=cpu expects training on such a device, got meta"):
        decoder(_encoded(source, decoder), torch.device("meta"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", count=4, splits=("train", "val"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_machine_without_cuda_device_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="decode=cuda needs a CUDA device, but PyTorch finds none"):
        ImageFolderDataModule(folder, decode="cuda")


class _Recording(pl.LightningModule):
    """LightningModule that records the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.trained: list[Batch] = []
        self.validated: list[Batch] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.trained.append(batch)
        return batch.images.mean() * self.scale

    def validation_step(self, batch: Batch) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _module(folder: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(folder, image_size=32, batch_size=4, num_workers=0, **options)


def _fit(folder: Path, data: ImageFolderDataModule, **options: Any) -> _Recording:
    module = _Recording()
    trainer = make_trainer(folder, **options)
    trainer.fit(module, datamodule=data)
    return module


def _module_on_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ImageFolderDataModule:
    """Return a data module with `decode="cuda"` that decodes on the CPU."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        data = _module(folder, decode="cuda", **options)
    assert data.jpeg_decoder is not None
    data.jpeg_decoder.device_type = "cpu"
    return data


@quiet
def test_training_gets_the_images_of_the_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = _fit(folder, _module_on_cpu(folder, monkeypatch))
    expected = _fit(folder, _module(folder))
    assert len(decoded.trained) == 3
    for one, other in zip(decoded.trained, expected.trained, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert _differences(one.images, other.images).mean((1, 2, 3)).max() < 2
    for one, other in zip(decoded.validated, expected.validated, strict=True):
        assert torch.equal(one.images, other.images)


@quiet
def test_images_have_the_precision_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _fit(folder, _module_on_cpu(folder, monkeypatch), precision="bf16-true")
    assert {batch.images.dtype for batch in module.trained} == {torch.bfloat16}


@quiet
def test_refused_jpegs_count_for_max_bad_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sorted((folder / "train").rglob("*.jpg"))[:11]:
        path.write_bytes(_without_quantization_tables(path.read_bytes()))
    with pytest.raises(LightspineError, match="of 12 images"):
        _fit(folder, _module_on_cpu(folder, monkeypatch))


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["light", "medium", "crop", "random"])
def test_gpu_decodes_like_the_workers(source: FileSource, augmentation: Any) -> None:
    batch, expected = _decode(source, augmentation, device="cuda:0"), _by_workers(source, augmentation)
    assert batch.images.device.type == "cuda"
    assert batch.labels.tolist() == expected.labels.tolist()
    # nvJPEG does not smooth the colors of 4:2:0 images between pixels, as libjpeg does.
    assert _differences(batch.images, expected.images).mean((1, 2, 3)).max() < 4


def _shrunk(side: int, interpolation: str, size: int = 32) -> tuple[Jpeg, tuple[int, int]]:
    box = (0, 0, side, side)
    return Jpeg("", 0, (side, side), box, interpolation, flip=False, jitter=()), (size, size)


@pytest.mark.parametrize(
    ("interpolation", "factor"), [("bilinear", 94), ("bicubic", 47)], ids=["bilinear", "bicubic"]
)
def test_resize_on_cuda_is_asked_for_what_its_shared_memory_holds(interpolation: str, factor: int) -> None:
    assert gpu_decoding._fits_resize_on_cuda(*_shrunk(32 * factor, interpolation))
    assert not gpu_decoding._fits_resize_on_cuda(*_shrunk(32 * factor + 32, interpolation))
    assert gpu_decoding._fits_resize_on_cuda(*_shrunk(8, interpolation, 224))


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [1500, 1540, 3000, 3050])
def test_gpu_shrinks_by_every_factor(interpolation: str, side: int) -> None:
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    on_cpu, on_gpu = (
        gpu_decoding._resized_crop(image.to(device), *_shrunk(side, interpolation))
        for device in ("cpu", "cuda")
    )
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@on_device
def test_gpu_names_and_replaces_a_jpeg_that_fails(source: FileSource) -> None:
    path = Path(source.name(4))
    path.write_bytes(_without_quantization_tables(path.read_bytes()))
    batch = _decode(source, device="cuda:0")
    assert batch.labels.tolist() == [*range(4), 5, *range(5, 10)]
    assert [bad.path for bad in batch.bad] == [str(path)]


@pytest.mark.gpu
@on_device
def test_gpu_decoder_leaves_memory_of_queued_kernels_alone(source: FileSource) -> None:
    decoder = _decoder("light", "cuda")
    encoded = _encoded(source, decoder)
    for repeat in range(20):
        decoder(encoded, torch.device("cuda:0"))
        # Tensors of the sizes of the images, which are read after they were freed for the allocator.
        values = [
            torch.full((3, *jpeg.size), repeat + 1, dtype=torch.uint8, device="cuda")
            for jpeg in encoded.jpegs
        ]
        sizes = [value.numel() for value in values]
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)
        sums = [value.sum(dtype=torch.int64) for value in values]
        del values
        decoder(encoded, torch.device("cuda:0"))
        assert [int(total) for total in sums] == [(repeat + 1) * size for size in sizes]
