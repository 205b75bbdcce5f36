"""Evaluation datasets in the checkpoint's class order: ImageNet folders, class mappings, shards."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from lightspine.data.imagenet_classes import imagenet_synsets
from lightspine.errors import UsageError
from lightspine.evaluation import evaluate, predict
from lightspine.evaluation.classifiers import class_names, load_classifier
from support.checkpoints import save_small
from support.images import COLOURS, write_folder, write_image


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 1000 classes without names, like the official ones."""
    return save_small(tmp_path_factory.mktemp("labelled") / "imagenet.safetensors")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("labelled") / "colours.safetensors", classes=list(COLOURS))


def _classes_with_images(report: dict) -> list[int]:
    return [number for number, entry in enumerate(report["classes"].values()) if entry["images"]]


def test_folders_of_ids_are_imagenet_classes(imagenet: Path, tmp_path: Path) -> None:
    for number in (7, 500):
        write_image(tmp_path / imagenet_synsets()[number] / "0.png", (1, 2, 3))
    report = evaluate(imagenet, tmp_path)
    assert _classes_with_images(report) == [7, 500]
    assert report["candidates"] == 1000


def test_folders_of_numbers_are_imagenet_classes(imagenet: Path, tmp_path: Path) -> None:
    for number in (2, 10):
        write_image(tmp_path / str(number) / "0.png", (1, 2, 3))
    assert _classes_with_images(evaluate(imagenet, tmp_path)) == [2, 10]


def test_flat_validation_folder_is_read_with_its_list(imagenet: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.png", (1, 2, 3))
    lines = [f"ILSVRC2012_val_{number:08d}.JPEG {800 + number}" for number in (1, 2)]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    assert _classes_with_images(evaluate(imagenet, tmp_path)) == [801, 802]


def test_mapping_of_a_part_restricts_the_choice(imagenet: Path, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", count=2)
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"blue": 3, "green": 4, "red": 5}))
    report = evaluate(imagenet, images, class_mapping=mapping)
    assert report["candidates"] == 3
    assert sum(list(report["classes"].values())[number]["predicted"] for number in (3, 4, 5)) == 6
    assert report["top5"] is None


def test_ids_restrict_the_choice_when_asked_to(imagenet: Path, tmp_path: Path) -> None:
    for number in (7, 500):
        write_image(tmp_path / imagenet_synsets()[number] / "0.png", (1, 2, 3))
    assert evaluate(imagenet, tmp_path, class_mapping="imagenet")["candidates"] == 2


def test_image_with_several_right_classes_counts_for_any(imagenet: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    files = [write_image(root / f"{name}.png", colour) for name, colour in COLOURS.items()]
    ranked = [_ranked(imagenet, file) for file in files]
    labels = [[ranked[0][9], ranked[0][0]], [ranked[1][1], ranked[1][2]], [ranked[2][7], ranked[2][8]]]
    mapping = tmp_path / "labels.json"
    mapping.write_text(json.dumps({file.name: right for file, right in zip(files, labels, strict=True)}))
    report = evaluate(imagenet, root, class_mapping=mapping)
    assert (report["top1"], report["top5"]) == pytest.approx((100 / 3, 200 / 3))
    assert (report["loss"], report["classes"], report["confusion"]) == (None, None, None)


def test_class_beyond_the_checkpoint_is_refused(colours: Path, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", count=1)
    (tmp_path / "mapping.json").write_text(json.dumps([0, 1, 3]))
    with pytest.raises(UsageError, match=r"expected class indices below 3, .* got 3"):
        evaluate(colours, images, class_mapping=tmp_path / "mapping.json")


def test_shards_score_as_their_folder(colours: Path, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", count=4)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for file in sorted(images.glob("*/*.jpg")):
            stem = f"{file.parent.name}-{file.stem}"
            for name, data in (
                (f"{stem}.jpg", file.read_bytes()),
                (f"{stem}.cls", file.parent.name.encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    folder, shards = evaluate(colours, images), evaluate(colours, tmp_path / "all.tar")
    assert shards["confusion"] == folder["confusion"]


def test_listing_hash_follows_names_and_classes(colours: Path, tmp_path: Path) -> None:
    first, same, other = (write_folder(tmp_path / name, count=2) for name in ("a", "b", "c"))
    (other / "red" / "0.jpg").rename(other / "blue" / "9.jpg")
    hashes = [evaluate(colours, root)["listing_sha256"] for root in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def _ranked(checkpoint: Path, file: Path) -> list[int]:
    """Return all class indices, most probable first."""
    numbers = {name: number for number, name in enumerate(class_names(load_classifier(checkpoint)[1], 1000))}
    return [numbers[score.name] for score in predict(checkpoint, [file], topk=1000)[0].classes]
