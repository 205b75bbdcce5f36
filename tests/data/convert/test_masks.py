"""Conversion of segmentation masks."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightspine.data.convert import convert_masks
from lightspine.data.modules import SegmentationFolderDataModule
from lightspine.data.segmentation import scan_segmentation_folder
from lightspine.errors import UsageError
from support.images import write_image

CLASSES = np.arange(48 * 64).reshape(48, 64) // 11 % 3


def _write(
    root: Path, mask: np.ndarray, *, image: str = "images/{}.jpg", label: str = "masks/{}.png", count: int = 4
) -> Path:
    for number in range(count):
        write_image(root / image.format(number), (90, 60, 200), size=mask.shape[1::-1], seed=number)
        path = root / label.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint16 if mask.max() > 255 else np.uint8)).save(path)
    return root


def _labels(out: Path) -> np.ndarray:
    splits = scan_segmentation_folder(out)
    return splits.reader.read(splits.train[0].labels)


def test_masks_of_0_and_255_become_two_classes(tmp_path: Path) -> None:
    mask = np.where(CLASSES == 1, 255, 0)
    found = convert_masks(_write(tmp_path / "in", mask), tmp_path / "out")
    assert np.array_equal(_labels(tmp_path / "out"), CLASSES == 1)
    assert (found.class_names, found.images) == (["background", "foreground"], {"train": 3, "val": 1})
    assert found.objects == {
        "background": 4 * int((CLASSES != 1).sum()),
        "foreground": 4 * int((CLASSES == 1).sum()),
        "ignored": 0,
    }


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((0, 127, 254), ["0", "127", "254"]),
        ((0, 1000, 2000), ["0", "1000", "2000"]),
        ((0, 1, 2), ["0", "1", "2"]),
        ((0, 128, 255), ["0", "128", "255"]),
    ],
)
def test_values_in_ascending_order_become_classes(
    values: tuple[int, ...], names: list[str], tmp_path: Path
) -> None:
    found = convert_masks(_write(tmp_path / "in", np.array(values)[CLASSES]), tmp_path / "out")
    assert np.array_equal(_labels(tmp_path / "out"), CLASSES)
    assert found.class_names == names


def test_255_beside_class_indices_stays_ignored(tmp_path: Path) -> None:
    mask = np.array([0, 1, 255])[CLASSES]
    found = convert_masks(_write(tmp_path / "in", mask), tmp_path / "out")
    assert np.array_equal(_labels(tmp_path / "out"), mask)
    assert found.objects["ignored"] == 4 * int((mask == 255).sum())


COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])


def test_colors_become_classes(tmp_path: Path) -> None:
    found = convert_masks(_write(tmp_path / "in", COLORS[CLASSES]), tmp_path / "out")
    assert found.class_names == ["#000000", "#008000", "#800000"]
    assert np.array_equal(_labels(tmp_path / "out"), np.array([0, 2, 1])[CLASSES])


@pytest.mark.parametrize(
    ("mask", "lines"),
    [
        (COLORS[CLASSES], "sky 0 0 0\nroad 128 0 0\n"),
        (np.array([0, 50, 90])[CLASSES], "sky 0\nroad 50\n"),
    ],
    ids=["colors", "values"],
)
def test_file_of_values_gives_names_and_order(mask: np.ndarray, lines: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(lines)
    root = _write(tmp_path / "in", mask)
    found = convert_masks(root, tmp_path / "out", class_names=tmp_path / "names.txt")
    assert (found.class_names, found.objects["ignored"]) == (["sky", "road"], 4 * int((CLASSES == 2).sum()))
    assert np.array_equal(_labels(tmp_path / "out"), np.array([0, 1, 255])[CLASSES])
    assert "which has no class and is ignored" in str(found.issues)


def test_file_of_names_gives_names(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sky\nroad\ntree\n")
    root = _write(tmp_path / "in", 100 * CLASSES)
    assert convert_masks(root, tmp_path / "out", class_names=tmp_path / "names.txt").class_names[1] == "road"
    (tmp_path / "names.txt").write_text("sky\n")
    with pytest.raises(UsageError, match=r"expected 3 class names, one per value .*\(0, 100, 200\), got 1"):
        convert_masks(root, tmp_path / "other", class_names=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
        ("{}.jpg", "{}_mask.png"),
        ("images/{}.jpg", "masks/{}_mask.png"),
        ("x/{}.jpg", "x/mask_{}.png"),
        ("leftImg8bit/city/{}_leftImg8bit.png", "gtFine/city/{}_gtFine_labelIds.png"),
        ("Images/{}.JPG", "Labels/{}.PNG"),
    ],
)
def test_masks_are_paired_by_usual_names(image: str, label: str, tmp_path: Path) -> None:
    found = convert_masks(_write(tmp_path / "in", CLASSES, image=image, label=label), tmp_path / "out")
    assert (found.images, bool(found.issues)) == ({"train": 3, "val": 1}, False)


@pytest.mark.parametrize(
    ("image", "label"), [("images/{}/0.jpg", "masks/{}/0.png"), ("{}/a/0.jpg", "{}/a/0_mask.png")]
)
def test_split_folders_are_kept(image: str, label: str, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_image(tmp_path / "in" / image.format(split), (1, 2, 3), size=(64, 48))
        path = tmp_path / "in" / label.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(CLASSES.astype(np.uint8)).save(path)
    assert convert_masks(tmp_path / "in", tmp_path / "out").images == {"train": 1, "val": 1}


def test_result_is_what_the_data_module_reads(tmp_path: Path) -> None:
    convert_masks(_write(tmp_path / "in", np.where(CLASSES == 1, 255, 0)), tmp_path / "out")
    data = SegmentationFolderDataModule(tmp_path / "out", num_workers=0, batch_size=1, val_scale=None)
    batch = next(iter(data.val_dataloader()))
    assert np.array_equal(batch.labels[0].numpy(), CLASSES == 1)


def test_flawed_pairs_are_counted(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", CLASSES, count=6)
    Image.fromarray(CLASSES[:, :40].astype(np.uint8)).save(root / "masks" / "0.png")
    (root / "masks" / "1.png").rename(root / "masks" / "gone.png")
    (root / "masks" / "2.png").write_bytes(b"")
    found = convert_masks(root, tmp_path / "out")
    assert dict(found.issues.counts) == {
        "mask of another size than its image": 1,
        "image without a mask": 1,
        "mask without an image": 1,
        "pair that cannot be read": 1,
    }
    assert sum(found.images.values()) == 3


def test_smoothed_masks_are_refused(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", np.arange(48 * 64).reshape(48, 64))
    with pytest.raises(UsageError, match=r"expected 2 to 255 values .* masks must be lossless"):
        convert_masks(root, tmp_path / "out")


def test_masks_of_one_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected 2 to 255 values in the masks, .* got 1"):
        convert_masks(_write(tmp_path / "in", np.zeros((48, 64))), tmp_path / "out")


def test_mask_is_turned_like_its_image(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", CLASSES)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        Image.fromarray(CLASSES.astype(np.uint8)).save(root / "masks" / f"{number}.png", exif=exif)
        Image.new("RGB", (64, 48)).save(root / "images" / f"{number}.jpg", exif=exif)
    convert_masks(root, tmp_path / "out")
    assert np.array_equal(_labels(tmp_path / "out"), np.rot90(CLASSES, -1))
