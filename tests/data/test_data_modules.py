"""Classification data modules: image order, batches, training and invalid arguments."""

import io
import tarfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightspine.data import Augmentation
from lightspine.data.modules import (
    DigitsDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    ImageListDataModule,
    ImageNetDataModule,
    ShardDataModule,
)
from lightspine.errors import LightspineError, UsageError
from support.images import COLOURS, shared_archive, truncate, write_folder, write_image
from support.training import make_trainer

# Warnings between Lightning and torch, and about num_workers.
quiet = pytest.mark.filterwarnings(
    "ignore:`isinstance:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:.*`train_dataloader` from",
)
FAST: dict[str, Any] = {"image_size": 32, "num_workers": 0, "augmentation": "none"}


class _Counting(pl.LightningModule):
    """LightningModule that records the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.labels: list[int] = []

    def training_step(self, batch: Any) -> Tensor:
        self.labels += batch.labels.tolist()
        return batch.images.mean() * self.bias

    def validation_step(self, batch: Any) -> None:
        self.labels += batch.labels.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _epoch(data: ImageDataModule, epoch: int = 0) -> tuple[Tensor, list[int]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([batch.images for batch in batches]), [int(x) for b in batches for x in b.labels]


def test_order_repeats_with_seed_and_changes_with_epoch() -> None:
    first = _epoch(DigitsDataModule(seed=1, augment=False))[1]
    assert first == _epoch(DigitsDataModule(seed=1, augment=False))[1]
    assert first != _epoch(DigitsDataModule(seed=1, augment=False), epoch=1)[1]
    assert first != _epoch(DigitsDataModule(seed=2, augment=False))[1]


def test_last_incomplete_batch_is_left_out_of_training_only() -> None:
    data = DigitsDataModule(batch_size=64)
    assert {len(labels) for _, labels, _ in data.train_dataloader()} == {64}
    assert sum(len(labels) for _, labels, _ in data.val_dataloader()) == 359


def test_fewer_images_than_a_batch_make_one_batch(tmp_path: Path) -> None:
    data = ImageFolderDataModule(write_folder(tmp_path, count=2), batch_size=64, **FAST)
    assert [len(batch.labels) for batch in data.train_dataloader()] == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_goes_on_in_the_middle_with_the_same_images(tmp_path: Path, workers: int) -> None:
    options: dict[str, Any] = {"image_size": 32, "batch_size": 4, "augmentation": "strong"}
    write_folder(tmp_path, count=8)
    whole, _ = _epoch(ImageFolderDataModule(tmp_path, num_workers=0, **options), epoch=2)
    loader = ImageFolderDataModule(tmp_path, num_workers=workers, **options).train_dataloader()
    loader.load_state_dict({"epoch": 2, "batch": 2})
    loader.sampler.set_epoch(2)
    torch.manual_seed(5)
    assert torch.equal(torch.cat([batch.images for batch in loader]), whole[8:])


def test_repeated_augmentation_shows_an_image_three_times_differently(tmp_path: Path) -> None:
    data = ImageFolderDataModule(
        write_folder(tmp_path, count=8),
        image_size=32,
        num_workers=0,
        batch_size=6,
        repeats=3,
        augmentation="strong",
    )
    images, labels = _epoch(data)
    assert labels[0::3] == labels[1::3] == labels[2::3]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_published_crop_is_kept_unless_set(tmp_path: Path) -> None:
    write_folder(tmp_path, count=2)
    published = {"crop_pct": 0.9, "crop_mode": "center"}
    kept = ImageFolderDataModule(tmp_path, preprocessing=published, **FAST).preprocessing
    changed = ImageFolderDataModule(
        tmp_path, preprocessing=published, crop_pct=1.0, crop_mode="squash", **FAST
    ).preprocessing
    assert (kept.crop_pct, kept.crop_mode) == (0.9, "center")
    assert (changed.crop_pct, changed.crop_mode) == (1.0, "squash")


def test_list_gives_the_batches_of_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, count=4, splits=("train", "val"))
    rows = [
        f"{path.relative_to(tmp_path).as_posix()},{path.parent.name},{path.parent.parent.name}"
        for path in sorted(tmp_path.glob("*/*/*.jpg"))
    ]
    (tmp_path / "list.csv").write_text("path,label,split\n" + "\n".join(rows))
    listed = ImageListDataModule(tmp_path / "list.csv", batch_size=4, **FAST)
    folder = ImageFolderDataModule(tmp_path, batch_size=4, **FAST)
    assert listed.class_names == folder.class_names
    assert torch.equal(_epoch(listed)[0], _epoch(folder)[0])


def _pack(folder: Path, shard: Path) -> None:
    with tarfile.open(shard, "w") as archive:
        for number, path in enumerate(sorted(folder.glob("*/*.jpg"))):
            for suffix, content in (("jpg", path.read_bytes()), ("cls", path.parent.name.encode())):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_batches_of_the_folder(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path / "images", count=4, splits=("train", "val"))
    for split in ("train", "val"):
        _pack(tmp_path / "images" / split, tmp_path / f"{split}-000.tar")
    options: dict[str, Any] = {"image_size": 32, "batch_size": 4, "augmentation": "medium"}
    shards = ShardDataModule(
        str(tmp_path / "train-{000..000}.tar"), str(tmp_path / "val-000.tar"), num_workers=workers, **options
    )
    folder = ImageFolderDataModule(tmp_path / "images", num_workers=0, **options)
    assert shards.class_names == folder.class_names
    assert torch.equal(_epoch(shards)[0], _epoch(folder)[0])


def test_shards_of_numbered_classes_take_names_from_a_file(tmp_path: Path) -> None:
    for i, name in enumerate(COLOURS):
        write_image(tmp_path / "images" / str(i) / "x.jpg", COLOURS[name])
    _pack(tmp_path / "images", tmp_path / "a.tar")
    (tmp_path / "classes.txt").write_text("\n".join(COLOURS))
    data = ShardDataModule(
        tmp_path / "a.tar", tmp_path / "a.tar", class_names=tmp_path / "classes.txt", **FAST
    )
    assert data.class_names == list(COLOURS)
    (batch,) = data.val_dataloader()
    assert batch.labels.tolist() == [0, 1, 2]


def test_imagenet_module_reads_the_official_layout(tmp_path: Path) -> None:
    for synset in ("n01440764", "n15075141"):
        write_image(tmp_path / "train" / synset / "a.JPEG", (9, 9, 9))
        write_image(tmp_path / "val" / synset / "b.JPEG", (9, 9, 9))
    data = ImageNetDataModule(tmp_path, **FAST)
    assert data.class_names[0] == "tench, Tinca tinca"
    (batch,) = data.val_dataloader()
    assert batch.labels.tolist() == [0, 1]


@quiet
def test_cifar_images_of_32_px_train_end_to_end(tmp_path: Path) -> None:
    with tarfile.open(shared_archive("cifar10_small.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    data = ImageFolderDataModule(
        tmp_path / "cifar10_small",
        image_size=32,
        batch_size=500,
        num_workers=0,
        augmentation=Augmentation(crop="padded", auto_augment=None, color_jitter=0.0, erasing=0.0),
        crop_pct=1.0,
    )
    assert data.num_classes == 10
    task = _Counting()
    make_trainer(tmp_path).fit(task, datamodule=data)
    assert len(task.labels) == 5000 + 1000


@quiet
def test_too_many_bad_images_stop_the_training(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=20, splits=("train", "val"))
    for path in sorted((root / "train").glob("*/1*.jpg"))[:12]:
        truncate(path)
    data = ImageFolderDataModule(root, batch_size=4, **FAST)
    with pytest.raises(LightspineError, match=r"10 of 60 images \(16\.7%\) cannot be used.*\.jpg"):
        make_trainer(tmp_path).fit(_Counting(), datamodule=data)


@quiet
def test_bad_images_within_the_allowed_share_do_not_stop(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=20, splits=("train", "val"))
    for path in sorted((root / "train").glob("*/1*.jpg"))[:12]:
        truncate(path)
    data = ImageFolderDataModule(root, batch_size=4, max_bad_share=0.2, **FAST)
    task = _Counting()
    make_trainer(tmp_path).fit(task, datamodule=data)
    assert len(task.labels) == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "at least 32 px, got 16"),
        ({"crop_pct": 0.0}, "crop_pct above 0 and at most 1, got 0.0"),
        ({"repeats": 0}, "repeats of at least 1, got 0"),
        ({"num_workers": -1}, "num_workers of at least 0, got -1"),
        ({"max_bad_share": 2.0}, "max_bad_share from 0 to 1, got 2.0"),
        ({"augmentation": Augmentation(hflip=2.0)}, "hflip from 0 to 1, got 2.0"),
        ({"val_split": "holdout"}, r"expected a folder holdout in .*, found train, val"),
    ],
)
def test_wrong_option_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, count=1, splits=("train", "val"))
    with pytest.raises(UsageError, match=message):
        ImageFolderDataModule(tmp_path, **options)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="batch size of at least 1, got 0"):
        DigitsDataModule(batch_size=0)


def test_root_with_validation_folders_only_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, count=1, splits=("val", "test"))
    with pytest.raises(UsageError, match=r"a folder train next to test and val in"):
        ImageFolderDataModule(tmp_path)


def test_validation_images_that_are_training_images_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, count=2)
    rows = [
        (f"{name}/{i}.jpg", name, split)
        for name in ("red", "blue")
        for i, split in ((0, "train"), (1, "val"))
    ]
    rows.append(("./red/0.jpg", "red", "val"))
    text = "\n".join(",".join(row) for row in [("path", "label", "split"), *rows])
    (tmp_path / "list.csv").write_text(text)
    ImageListDataModule(tmp_path / "list.csv", num_workers=0).split_record()
    shared = tmp_path / "red" / "0.jpg"
    assert f"1 of 3 validation images are training images too, first {shared}" in caplog.text
