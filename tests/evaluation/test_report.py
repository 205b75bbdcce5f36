"""Evaluation report files, and options that change the preprocessing."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import evaluate, write_report
from lightspine.evaluation.draw import draw_confusion_matrix
from lightspine.evaluation.metrics import ClassificationMetrics
from lightspine.evaluation.report import to_csv
from lightspine.models.saving import save_checkpoint
from support.checkpoints import save_small
from support.images import COLOURS, write_folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("report") / "colours.safetensors", classes=list(COLOURS))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", count=4)


def test_files_of_a_report(colours: Path, images: Path, tmp_path: Path) -> None:
    (images / "red" / "1.jpg").write_bytes(b"")
    written = write_report(evaluate(colours, images), tmp_path / "out")
    assert sorted(written) == ["classes.csv", "confusion.png", "report.json", "skipped.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(written)
    assert "red/1.jpg" in written["skipped.csv"].read_text()


def test_files_of_an_earlier_report_do_not_stay(colours: Path, images: Path, tmp_path: Path) -> None:
    (images / "red" / "1.jpg").write_bytes(b"")
    write_report(evaluate(colours, images), tmp_path / "out")
    (images / "red" / "1.jpg").unlink()
    write_report(evaluate(colours, images), tmp_path / "out")
    assert not (tmp_path / "out" / "skipped.csv").exists()


def test_class_rows_agree_with_the_confusion(colours: Path, images: Path, tmp_path: Path) -> None:
    report = evaluate(colours, images)
    with write_report(report, tmp_path)["classes.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    confusion = np.array(report["confusion"])
    assert [row["name"] for row in rows] == list(COLOURS)
    assert [int(row["predicted"]) for row in rows] == confusion.sum(axis=0).tolist()
    hits = [float(row["top1"]) * int(row["images"]) / 100 for row in rows]
    assert hits == pytest.approx(confusion.diagonal().tolist(), abs=1e-3)
    for row, counts in zip(rows, confusion - np.diag(confusion.diagonal()), strict=True):
        assert int(row["confused_images"]) == counts.max()


def test_report_says_what_repeats_it(colours: Path, images: Path) -> None:
    report = evaluate(colours, images, crop_pct=0.9, batch_size=5)
    assert report["checkpoint_sha256"] == hashlib.sha256(colours.read_bytes()).hexdigest()
    again = evaluate(**report["arguments"])
    for key in ("top1", "loss", "confusion", "preprocessing", "listing_sha256"):
        assert again[key] == report[key], key


def test_crop_and_size_change_the_preprocessing(colours: Path, images: Path) -> None:
    report = evaluate(colours, images, image_size=48, crop_pct=1.0, crop_mode="squash")
    found = report["preprocessing"]
    assert (found["input_size"], found["crop_pct"], found["crop_mode"]) == ([3, 48, 48], 1.0, "squash")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"crop_pct": 1.5}, "expected a crop_pct above 0 and at most 1, got 1.5"),
        ({"crop_mode": "middle"}, "expected a crop_mode of center, squash, border, got 'middle'"),
        ({"image_size": 16}, "expected an image size of at least 32 px, got 16"),
        ({"batch_size": 0}, "expected a batch size of at least 1"),
        ({"device": "warp"}, "device 'warp' is not available"),
        ({"weights": "ema"}, "has no 'ema' weights"),
    ],
)
def test_wrong_option_is_refused(
    option: dict[str, object], message: str, colours: Path, images: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(colours, images, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trained", "averaged"),
    [("model", "model_ema"), ("current_model_state", "state_dict")],
    ids=["official", "lightning"],
)
def test_weights_choose_between_trained_and_averaged(
    trained: str, averaged: str, images: Path, tmp_path: Path
) -> None:
    networks = [lightspine.create_model("shvit_s1", num_classes=3) for _ in range(2)]
    path = tmp_path / "both.pth"
    torch.save({trained: networks[0].state_dict(), averaged: networks[1].state_dict()}, path)
    found, expected = [], []
    for weights, network in zip(("model", "ema"), networks, strict=True):
        report = evaluate(path, images, weights=weights, image_size=64)  # type: ignore[arg-type]
        found.append((report["weights"], report["loss"]))
        alone = save_checkpoint(network, tmp_path / f"{weights}.safetensors")
        expected.append(evaluate(alone, images, image_size=64)["loss"])
    assert [kind for kind, _ in found] == ["raw", "ema"]
    assert [loss for _, loss in found] == expected
    assert expected[0] != expected[1]


def test_confusion_picture_is_grey(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (12, 12)) + np.diag([400] * 12)
    names = [f"class number {i} with a long name" for i in range(12)]
    draw_confusion_matrix(counts, names, tmp_path / "confusion.png", title="a title")
    pixels = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB")).astype(int)
    assert np.ptp(pixels, axis=2).max() == 0
    assert len(np.unique(pixels)) > 20


def test_confusion_picture_of_a_thousand_classes_shows_single_confusions(tmp_path: Path) -> None:
    counts = np.diag([50] * 1000)
    counts[300, 700] = 25
    draw_confusion_matrix(counts, [f"class {i}" for i in range(1000)], tmp_path / "all.png", title="")
    counts[300, 700] = 0
    draw_confusion_matrix(counts, [f"class {i}" for i in range(1000)], tmp_path / "none.png", title="")
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("all", "none")]
    difference = pictures[1].astype(int) - pictures[0]
    assert difference.max() > 100
    assert 0 < (difference > 30).sum() < 20


def test_confusion_picture_needs_a_name_per_class(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a square matrix with one name per row, got 3x3 and 2"):
        draw_confusion_matrix(np.zeros((3, 3)), ["a", "b"], tmp_path / "confusion.png", title="")


def test_csv_has_four_decimals_and_empty_cells() -> None:
    assert to_csv([("name", "IoU"), ("a", 50.0), ("b", None)]) == "name,IoU\na,50.0000\nb,\n"


def test_folder_that_is_a_file_is_refused(colours: Path, images: Path) -> None:
    with pytest.raises(UsageError, match="expected a folder for the report"):
        write_report(evaluate(colours, images), colours)


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(LightspineError, match="not finite for 1 images"):
        ClassificationMetrics(3).update(
            torch.tensor([[0.0, 1.0, 2.0], [torch.nan, 0.0, 0.0]]), torch.tensor([0, 1])
        )


def test_closed_classes_are_never_chosen() -> None:
    metrics = ClassificationMetrics(4, candidates=[0, 2])
    metrics.update(torch.tensor([[1.0, 9.0, 2.0, 8.0]]), torch.tensor([2]))
    assert metrics.compute()["top1"] == 100
    # Among classes 0 and 2 only: ln(1 + e^(1 - 2)).
    assert metrics.compute()["loss"] == pytest.approx(0.313262, abs=1e-5)


def test_top5_counts_the_five_best() -> None:
    metrics = ClassificationMetrics(7)
    metrics.update(torch.arange(7.0).repeat(2, 1), torch.tensor([2, 1]))
    assert (metrics.compute()["top1"], metrics.compute()["top5"]) == (0, 50)


def test_precision_recall_and_f1_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    logits = torch.randn(200, 6, generator=generator)
    logits[:, 5] = -9  # neither labeled nor predicted
    metrics = ClassificationMetrics(6)
    metrics.update(logits, labels)
    predicted = logits.argmax(1)
    scores = precision_recall_fscore_support(labels, predicted, zero_division=0)
    found = metrics.per_class(list("abcdef"))
    assert found is not None
    for key, values in zip(("precision", "top1", "f1"), scores[:3], strict=True):
        assert [found[name][key] or 0 for name in "abcde"] == pytest.approx((100 * values).tolist())
    assert found["e"]["top1"] is None
    assert found["f"] | {"confused_with": None} == found["f"]
    assert found["f"]["precision"] is None
    assert found["f"]["f1"] is None
    averages = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    computed = metrics.compute()
    names = ("macro_precision", "macro_recall", "macro_f1")
    assert [computed[name] for name in names] == pytest.approx([100 * value for value in averages[:3]])
    assert computed["majority_baseline"] == pytest.approx(100 * labels.bincount().max().item() / 200)


def test_averages_are_missing_with_several_correct_classes() -> None:
    metrics = ClassificationMetrics(3, right_classes=[(0, 1), (2,)])
    metrics.update(torch.eye(3)[:2], torch.tensor([0, 1]))
    found = metrics.compute()
    assert [found[name] for name in ("macro_recall", "macro_f1", "majority_baseline")] == [None] * 3


def test_labels_of_a_confusion_matrix_are_inside_the_picture(tmp_path: Path) -> None:
    names = ["Gänse blume", "Löwenzahn", "Rose", "rose", "tulip"]
    draw_confusion_matrix(8 * np.eye(5, dtype=int), names, tmp_path / "a.png", title="title", unit="images")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    for border in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert border.min() == 255
