"""Detection and segmentation data modules on real images."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightspine.data.detection import DetectionDataset
from lightspine.data.modules import CocoDataModule, CocoSemanticDataModule, SegmentationFolderDataModule
from lightspine.data.segmentation import CocoSemanticLabels
from lightspine.errors import UsageError
from support.coco import content, read_small, real_annotations, square, unpack, write_coco
from support.run_files import write_objects


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("coco_free", tmp_path_factory)


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("coco_free_semantic", tmp_path_factory)


def test_coco_training_batch_has_resized_images_with_objects_and_no_crowd(coco: Path) -> None:
    data = CocoDataModule(coco, shorter=96, longest=160, batch_size=3, num_workers=0)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.images) == 3
    assert all(min(image.shape[1:]) <= 96 and max(image.shape[1:]) <= 160 for image in batch.images)
    for image, target in zip(batch.images, batch.targets, strict=True):
        assert len(target["boxes"]) == len(target["masks"]) > 0
        assert target["masks"].shape[1:] == image.shape[1:]
        assert not target["iscrowd"].any()


def test_coco_validation_keeps_every_image_at_its_size(coco: Path) -> None:
    data = CocoDataModule(coco, masks=False, batch_size=8, num_workers=0)
    batches = list(data.val_dataloader())
    sizes = {
        int(target["image_id"]): tuple(image.shape[1:])
        for batch in batches
        for image, target in zip(batch.images, batch.targets, strict=True)
    }
    notes = data.val_annotations
    assert sizes == dict(zip(notes.image_ids.tolist(), map(tuple, notes.sizes.tolist()), strict=True))
    assert "masks" not in batches[0].targets[0]


def test_coco_splits_elsewhere_are_found_by_their_paths(coco: Path) -> None:
    data = CocoDataModule(
        "nowhere",
        train_annotations=coco / "annotations" / "instances_val2017.json",
        train_images=coco / "val2017",
        val_annotations=coco / "annotations" / "instances_val2017.json",
        val_images=coco / "val2017",
        masks=False,
    )
    assert len(data.val_annotations) == 66


def _splits(folder: Path, train: dict[str, Any], val: dict[str, Any]) -> dict[str, Path]:
    """Write two small COCO files and return their paths."""
    files = {name: write_coco(folder / name, part) for name, part in (("train", train), ("val", val))}
    return {f"{name}_annotations": file for name, file in files.items()} | {
        f"{name}_images": file.parent for name, file in files.items()
    }


def test_coco_flaws_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat = square(id=2, bbox=[5.0, 5.0, 0.0, 3.0])
    places = _splits(tmp_path, content(square(), flat), content(square()))
    with caplog.at_level(logging.WARNING):
        CocoDataModule(tmp_path, **places)
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "train2017: 1 x box without area"
    ]


def test_coco_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    other = content(square()) | {"categories": [{"id": 7, "name": "wolf"}]}
    places = _splits(tmp_path, content(square()), other)
    with pytest.raises(UsageError, match=r"category 'wolf' .* is not among the model's 2 classes"):
        CocoDataModule(tmp_path, **places)


def test_two_processes_share_the_images_of_an_epoch(coco: Path) -> None:
    class FakeTrainer:
        world_size = 2
        current_epoch = 0
        training = True

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    seen = []
    for rank in range(2):
        data = CocoDataModule(coco, masks=False, batch_size=1)
        data.trainer = FakeTrainer(rank)  # type: ignore[assignment]
        seen.append(set(data.train_dataloader().sampler))
    assert seen[0] | seen[1] == set(range(len(data.train_annotations)))
    assert len(seen[0] & seen[1]) <= 1


def test_segmentation_training_batch_is_cropped_and_normalised(semantic: Path) -> None:
    data = SegmentationFolderDataModule(semantic, crop=(64, 80), scale=(256, 64), batch_size=4, num_workers=0)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 64, 80)
    assert batch.labels.shape == (4, 64, 80)
    assert batch.images.min() < 0
    assert data.num_classes == 133


def test_segmentation_validation_keeps_the_labels_size(semantic: Path) -> None:
    data = SegmentationFolderDataModule(semantic, val_scale=(128, 64), val_divisor=32, batch_size=2)
    batch = next(iter(data.val_dataloader()))
    for image, labels, name in zip(batch.images, batch.labels, batch.names, strict=True):
        with Image.open(name) as file:
            assert tuple(labels.shape) == file.size[::-1]
        assert all(side % 32 == 0 for side in image.shape[1:])


def test_images_without_labels_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder, names in (("images", "abc"), ("annotations", "ab")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.linear_gradient("L").point(lambda value: value > 99).save(tmp_path / folder / f"{name}.png")
    with caplog.at_level(logging.WARNING):
        SegmentationFolderDataModule(tmp_path, num_classes=2, val_fraction=0.5)
    assert "1 x image without a label map, first " in caplog.text


def test_painted_labels_are_the_union_of_the_masks(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = unpack("nuclei_dsb2018", tmp_path_factory)
    data = CocoSemanticDataModule(root, train="train", val="val", val_scale=None, batch_size=1, num_workers=0)
    assert data.class_names == ["background", "nucleus"]
    batch = next(iter(data.val_dataloader()))
    notes = real_annotations("nuclei_dsb2018", "val", tmp_path_factory)
    height, width = notes.sizes[0].tolist()
    covered = sum(notes.areas[list(notes.objects(0))])
    # The masks of this dataset do not overlap.
    assert tuple(batch.labels[0].shape) == (height, width)
    assert int((batch.labels[0] == 1).sum()) == covered


def test_small_object_is_painted_over_a_large_one_and_a_crowd_has_no_class(tmp_path: Path) -> None:
    large = square()  # a dog from 10 to 30
    small = square(
        id=2, category_id=3, bbox=[14, 14, 4, 4], area=16, segmentation=[[14, 14, 18, 14, 18, 18, 14, 18]]
    )
    runs = {"size": [48, 64], "counts": [0, 48 * 32, 48 * 32]}  # the left half
    crowd = square(id=3, bbox=[0, 0, 32, 48], area=48 * 32, iscrowd=1, segmentation=runs)
    labels = CocoSemanticLabels(read_small(tmp_path, small, large, crowd)).read("0")
    assert [labels[y, y] for y in (5, 12, 15, 40)] == [255, 2, 1, 0]


def test_painting_boxes_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    notes = real_annotations("nuclei_dsb2018", "val", tmp_path_factory, masks=False)
    with pytest.raises(UsageError, match="expected annotations with masks"):
        CocoSemanticLabels(notes)


def test_seed_and_epoch_fix_the_augmentation(coco: Path) -> None:
    batches = []
    for _ in range(2):
        data = CocoDataModule(
            coco, shorter=64, longest=96, augmentation="multi_scale", batch_size=2, num_workers=0, seed=3
        )
        batches.append(next(iter(data.train_dataloader())))
    assert all(torch.equal(a, b) for a, b in zip(batches[0].images, batches[1].images, strict=True))


def test_loop_over_a_dataset_ends(tmp_path: Path) -> None:
    dataset = DetectionDataset(read_small(tmp_path, square(), images=3), replace_bad=True)
    assert len(list(dataset)) == 3


def test_coco_splits_are_found_by_their_usual_names(tmp_path: Path) -> None:
    for split in ("Train", "valid"):
        write_coco(tmp_path / split).rename(tmp_path / f"{split}.json")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"{split}.json").rename(tmp_path / "annotations" / f"instances_{split}.json")
    data = CocoDataModule(tmp_path)
    assert data.train_annotations.path(0) == tmp_path / "Train" / "1.jpg"
    assert data.val_annotations.path(0) == tmp_path / "valid" / "1.jpg"


def test_coco_masks_without_objects_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        file = write_coco(tmp_path / split, content())
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file.rename(tmp_path / "annotations" / f"instances_{split}.json")
    with pytest.raises(UsageError, match="expected at least two classes in the 1 label maps"):
        CocoSemanticDataModule(tmp_path)


def test_one_size_serves_training_and_validation(semantic: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"scale": (96, 256), "crop": (64, 64), "batch_size": 2, "num_workers": 0}
    with caplog.at_level(logging.INFO, logger="lightspine"):
        data = SegmentationFolderDataModule(semantic, **small)
    assert data.val_scale == (96, 256)
    assert not [message for message in caplog.messages if "resized" in message]
    image = next(iter(data.val_dataloader())).images[0]
    assert min(image.shape[1:]) == 96 or max(image.shape[1:]) == 256


def test_another_validation_size_is_told(semantic: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightspine"):
        SegmentationFolderDataModule(semantic, scale=(96, 256), val_scale=None)
    expected = "images are resized to [96, 256] px in training (scale), but keep their size in validation"
    assert expected in caplog.text


def test_share_of_a_coco_file_is_held_out_without_a_validation_split(tmp_path: Path) -> None:
    data = CocoDataModule(write_objects(tmp_path, "train", count=10), masks=False, val_fraction=0.3)
    train, val = (set(data.train_annotations.files), set(data.val_annotations.files))
    assert (len(train), len(val), train & val) == (7, 3, set())


def test_annotations_next_to_the_images_are_found(tmp_path: Path) -> None:
    write_objects(tmp_path, "train", "valid")
    for split in ("train", "valid"):
        file = tmp_path / "annotations" / f"instances_{split}.json"
        file.rename(tmp_path / split / "_annotations.coco.json")
    data = CocoDataModule(tmp_path, masks=False, num_workers=0, batch_size=2)
    assert (len(data.train_annotations), len(data.val_annotations)) == (4, 5)
    assert len(next(iter(data.val_dataloader())).images) == 2


def test_folder_without_a_training_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a COCO file or a folder with annotations/"):
        CocoDataModule(tmp_path)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        pytest.param("annotations/instances_default.json", "images/default", id="CVAT"),
        pytest.param("result.json", "images", id="Label Studio"),
        pytest.param("labels.json", ".", id="beside the images"),
    ],
)
def test_only_coco_file_of_a_folder_is_split_at_random(file: str, images: str, tmp_path: Path) -> None:
    write_coco(tmp_path / images, content(square(), square(id=2, image_id=2), images=2))
    (tmp_path / "settings.json").write_text("{}")
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    (tmp_path / images / "objects.json").rename(path)
    data = CocoDataModule(tmp_path)
    assert (len(data.train_annotations), len(data.val_annotations)) == (1, 1)
    labels = CocoSemanticDataModule(tmp_path, crop=(32, 32))
    assert labels.class_names == ["background", "cat", "dog"]


def test_coco_files_named_by_their_splits_are_found(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        described = content(*(square(id=i, image_id=i) for i in range(1, count + 1)), images=count)
        file = write_coco(tmp_path / split, described)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file.rename(tmp_path / "annotations" / f"{split}.json")
    data = CocoDataModule(tmp_path)
    assert (len(data.train_annotations), len(data.val_annotations)) == (3, 1)


@pytest.mark.parametrize("images", [2, 40])
def test_epoch_has_the_given_number_of_images(images: int, tmp_path: Path) -> None:
    objects = [square(id=number, image_id=number) for number in range(1, images + 1)]
    write_coco(tmp_path, content(*objects, images=images))
    options: dict[str, Any] = {"images_per_epoch": 12, "batch_size": 4, "num_workers": 0}
    detection = CocoDataModule(tmp_path, shorter=48, longest=64, val_fraction=0.5, **options)
    segmentation = CocoSemanticDataModule(tmp_path, crop=(32, 32), val_fraction=0.5, **options)
    assert [len(batch.images) for batch in detection.train_dataloader()] == [4, 4, 4]
    assert [len(batch.images) for batch in segmentation.train_dataloader()] == [4, 4, 4]


def test_classes_that_differ_only_in_case_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described = content(square(), square(id=2, image_id=2), images=2)
    described["categories"][1]["name"] = "Dog"
    write_coco(tmp_path, described)
    CocoDataModule(tmp_path)
    assert "the classes Dog and dog differ only in case: are they one class?" in caplog.text
