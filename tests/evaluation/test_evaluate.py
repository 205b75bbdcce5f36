"""`evaluate`: reports on the digits and on image folders."""

import json
from pathlib import Path

import pytest
import torch

import lightspine
from lightspine.data import DigitsDataset, Preprocessing, scan_image_folder
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import evaluate, write_report
from lightspine.models.factory import load_model
from lightspine.models.saving import save_checkpoint
from support.images import COLOURS, truncate, write_folder, write_image
from support.training import SMALL_MODEL

SIZE = Preprocessing(input_size=(3, 32, 32)).to_dict()


def _save(path: Path, *, classes: list[str]) -> Path:
    torch.manual_seed(0)
    model = lightspine.create_model(SMALL_MODEL, num_classes=len(classes))
    return save_checkpoint(model, path, class_names=classes, preprocessing=SIZE)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A checkpoint with three color classes that are not in alphabetical order."""
    return _save(tmp_path / "colours.safetensors", classes=["red", "green", "blue"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits checkpoint."""
    folder = tmp_path_factory.mktemp("digits")
    return _save(folder / "digits.safetensors", classes=[str(digit) for digit in range(10)])


def test_scores_agree_with_predictions_counted_one_by_one(digits: Path) -> None:
    report = evaluate(digits, "digits", batch_size=50)
    model = load_model(digits)[0]
    dataset = DigitsDataset("test")
    with torch.no_grad():
        ranks = [model(image[None])[0].argsort(descending=True) for image, *_ in dataset]
    labels = dataset.labels.tolist()
    assert report["images"] == len(labels) == 359
    hits = sum(int(rank[0]) == label for rank, label in zip(ranks, labels, strict=True))
    near = sum(label in rank[:5].tolist() for rank, label in zip(ranks, labels, strict=True))
    assert (report["top1"], report["top5"]) == pytest.approx((100 * hits / 359, 100 * near / 359))


def test_confusion_holds_every_image_once(digits: Path) -> None:
    report = evaluate(digits, "digits")
    assert [sum(row) for row in report["confusion"]] == [c["images"] for c in report["classes"].values()]
    assert sum(map(sum, report["confusion"])) == report["images"]
    diagonal = [row[i] / sum(row) * 100 for i, row in enumerate(report["confusion"])]
    assert diagonal == pytest.approx([c["top1"] for c in report["classes"].values()])


def test_report_is_written_as_json(digits: Path, tmp_path: Path) -> None:
    report = evaluate(digits, "digits")
    written = write_report(report, tmp_path / "deep" / "out")
    assert json.loads(written["report.json"].read_text()) == report
    assert report["model"] == SMALL_MODEL
    assert report["preprocessing"]["input_size"] == [3, 32, 32]


def test_folders_are_matched_with_the_classes_of_the_checkpoint(colours: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "blue" / "0.png", COLOURS["blue"])
    report = evaluate(colours, tmp_path / "images")
    assert {name: c["images"] for name, c in report["classes"].items()} == {"red": 0, "green": 0, "blue": 1}
    assert report["top5"] is None


def test_validation_part_of_a_folder_is_used(colours: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "images", count=5, splits=("train",))
    write_folder(tmp_path / "images", count=2, splits=("val",))
    report = evaluate(colours, tmp_path / "images")
    assert (report["split"], report["images"]) == ("val", 6)


def test_held_out_share_is_the_one_of_training(colours: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=10)
    splits = scan_image_folder(root, val_fraction=0.3, seed=4)
    for sample in splits.train:
        sample.path.write_bytes(b"")
    report = evaluate(colours, root, val_fraction=0.3, seed=4)
    assert (report["images"], report["skipped"]) == (9, {})


def test_bad_images_are_skipped_and_named(colours: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=3)
    bad = truncate(write_image(root / "red" / "1.jpg", COLOURS["red"], size=(99, 99)))
    report = evaluate(colours, root)
    assert report["images"] == 8
    assert list(report["skipped"]) == [str(bad)]


def test_only_bad_images_are_an_error(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "red").mkdir(parents=True)
    (tmp_path / "images" / "red" / "0.png").write_bytes(b"")
    with pytest.raises(LightspineError, match=r"none of the images of .* can be used; .*0\.png"):
        evaluate(colours, tmp_path / "images")


def test_unknown_class_is_named(colours: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "violet" / "0.png", (200, 0, 200))
    with pytest.raises(UsageError, match=r"class violet of .* is not among the model's 3 classes"):
        evaluate(colours, tmp_path / "images")


def test_digits_need_ten_classes(colours: Path) -> None:
    with pytest.raises(UsageError, match="expected the checkpoint's 3 classes, but the digits has 10"):
        evaluate(colours, "digits")


def test_fraction_is_refused_where_the_folder_has_its_own_split(colours: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=2, splits=("train", "val"))
    with pytest.raises(UsageError, match="which has a folder val"):
        evaluate(colours, root, val_fraction=0.5)
