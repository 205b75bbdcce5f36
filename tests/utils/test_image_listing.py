"""`ImageListing`: every image of a folder once, the same files for every task, and a count of the rest."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightspine.data import list_images, scan_image_folder
from lightspine.data.class_mapping import ClassMapping
from lightspine.data.segmentation import pair_labels
from lightspine.errors import UsageError
from lightspine.evaluation.batch_inference.sources import open_images
from lightspine.export.quantization import list_calibration_images
from lightspine.utils.image_files import ImageListing, expand_image_paths, list_image_files
from support.images import write_image

SEEN = ["c/0.png", "c/1.JPG", "c/deep/2.jfif"]


def _write_odd_folder(root: Path) -> Path:
    """Write the images of `SEEN`, and everything that is left out, below `root/c`."""
    folder = root / "c"
    for name in SEEN:
        path = root / name
        write_image(path.with_suffix(".png"), (90, 60, 200)).rename(path)
    for name in (".ipynb_checkpoints/0.png", "@eaDir/0.png", "__MACOSX/0.png", ".0.png"):
        write_image(folder / name, (1, 2, 3))
    (folder / "notes.txt").write_text("none")
    (folder / "phone.heic").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    (folder / "folder.png").mkdir()
    for name, target in (("self", "."), ("parent", ".."), ("again.png", "0.png"), ("gone.png", "none.png")):
        (folder / name).symlink_to(target)
    return root


def _names(paths: list[Path], root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in paths)


LISTERS: dict[str, Callable[[Path, Path], list[Path]]] = {
    "training and evaluation": lambda root, _: [sample.path for sample in list_images(root)[1]],
    "class mapping": lambda root, _: [image.path for image in ClassMapping(folders={"c": 0}).find(root)],
    "prediction": lambda root, _: expand_image_paths([root]),
    "calibration": lambda root, _: list_calibration_images(root),
    "batch inference": lambda root, out: [root / name for name in open_images(root, out / "list").paths],
    "segmentation": lambda root, out: [pair.image for pair in pair_labels(root, _copy_labels(root, out))[0]],
}


def _copy_labels(root: Path, out: Path) -> Path:
    for name in SEEN:
        path = out / Path(name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, path)
    return out


@pytest.mark.parametrize("lister", LISTERS.values(), ids=LISTERS)
def test_every_task_lists_the_same_images(lister: Callable[[Path, Path], list[Path]], tmp_path: Path) -> None:
    root = _write_odd_folder(tmp_path / "data")
    assert _names(lister(root, tmp_path / "out"), root) == SEEN


@pytest.mark.parametrize("lister", LISTERS.values(), ids=LISTERS)
def test_every_task_names_what_it_left_out(
    lister: Callable[[Path, Path], list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = _write_odd_folder(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        lister(root, tmp_path / "out")
    assert "3 x link to a file or folder that is listed already" in caplog.text
    assert f"1 x file with the suffix .heic, first {root / 'c' / 'phone.heic'}" in caplog.text


def test_listing_counts_each_kind(tmp_path: Path) -> None:
    listing = ImageListing(_write_odd_folder(tmp_path))
    listing.list(tmp_path)
    assert dict(listing.left_out.counts) == {
        "hidden folder": 1,
        "hidden file": 1,
        "folder of the operating system": 2,
        "file with the suffix .txt": 1,
        "file with the suffix .heic": 1,
        "link to a missing file": 1,
        "link to a file or folder that is listed already": 3,
    }


def test_listing_of_a_tidy_folder_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "0.png", (1, 2, 3))
    with caplog.at_level(logging.INFO):
        assert list_image_files(tmp_path) == [tmp_path / "0.png"]
    assert not caplog.records


def test_listing_follows_links_to_other_places(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for number in range(3):
        write_image(store / f"{number}.png", (1, 2, 3))
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").symlink_to(store / "0.png")
    (data / "folder").symlink_to(store)
    # The file of a.png is met again in the folder, under its own name.
    assert _names(list_image_files(data), data) == ["a.png", "folder/0.png", "folder/1.png", "folder/2.png"]


def test_listing_keeps_links_into_hidden_folder(tmp_path: Path) -> None:
    write_image(tmp_path / ".git" / "annex" / "0.png", (1, 2, 3))
    (tmp_path / "0.png").symlink_to(".git/annex/0.png")
    assert list_image_files(tmp_path) == [tmp_path / "0.png"]


def test_listing_names_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "locked" / "0.png", (1, 2, 3))
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = ImageListing(tmp_path)
    assert listing.list(tmp_path) == []
    assert "1 x folder that cannot be read" in str(listing.left_out)


def test_val_images_that_link_to_training_images_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            for number in range(2):
                write_image(tmp_path / split / name / f"{number}.png", (1, 2, 3), seed=number)
    (tmp_path / "val" / "a" / "leak.png").symlink_to(tmp_path / "train" / "a" / "0.png")
    splits = scan_image_folder(tmp_path)
    assert len(splits.val) == 4
    assert "leak.png" in caplog.text


def test_class_folder_that_links_to_another_class_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(2):
            write_image(tmp_path / name / f"{number}.png", (1, 2, 3))
    (tmp_path / "c").symlink_to("a")
    with pytest.raises(UsageError, match=r"class c of .* has no image; left out: 1 x link"):
        scan_image_folder(tmp_path)


def test_expand_image_paths_lists_each_file_once(tmp_path: Path) -> None:
    inside = [write_image(tmp_path / "d" / name, (1, 2, 3)) for name in ("a.png", "sub/b.png")]
    assert expand_image_paths([inside[0], tmp_path / "d", tmp_path / "d" / "sub"]) == inside


def test_links_in_a_circle_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "self.png").symlink_to("self.png")
    write_image(tmp_path / "c.png", (1, 2, 3))
    listing = ImageListing(tmp_path)
    assert listing.list(tmp_path) == [tmp_path / "c.png"]
    assert listing.list_folders(tmp_path) == []
