"""`lightspine evaluate` and `predict` with detectors and segmenters."""

import json
from pathlib import Path

import pytest

import lightspine
from lightspine.models import checkpoint as checkpoint_module
from lightspine_cli.main import main
from support.coco import content, square, write_coco
from support.dense_files import detector_file, segmenter_file
from support.images import write_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder with checkpoints of a detector, a segmenter and a classifier."""
    root = tmp_path_factory.mktemp("data")
    file = write_coco(root / "val2017", content(square(), images=2))
    (root / "annotations").mkdir()
    file.rename(root / "annotations" / "instances_val2017.json")
    detector_file(root / "detector.safetensors", ["cat", "dog"])
    segmenter_file(root / "segmenter.safetensors", ["background", "cat", "dog"])
    lightspine.save_checkpoint(lightspine.create_model("shvit_s1"), root / "classifier.safetensors")
    return root


def test_evaluate_writes_the_report_of_a_detector(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(folder / "detector.safetensors"), "--data", str(folder)]
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "report")]) == 0
    output = capsys.readouterr().out
    assert "retinanet over test_efficientnet" in output
    assert "AP50" in output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["command"].startswith("lightspine evaluate --checkpoint")
    assert len(json.loads((tmp_path / "report" / "detections.json").read_text())) == 10


def test_evaluate_prints_a_segmenters_report_as_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--checkpoint",
        str(folder / "segmenter.safetensors"),
        "--data",
        str(folder),
        "--multi-scale",
    ]
    assert main(["evaluate", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scores"].keys() == {"mIoU", "mAcc", "aAcc"}
    assert report["settings"]["ratios"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert report["settings"]["flip"] is True


def test_predict_takes_a_folder_and_draws(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(folder / "detector.safetensors")
    out = tmp_path / "pictures"
    arguments = ["--checkpoint", checkpoint, str(folder / "val2017"), "--out", str(out)]
    assert main(["predict", *arguments, "--score-threshold", "0", "--coco", str(tmp_path / "a.json")]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["1.png", "2.png"]
    assert "1.jpg" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "a.json").read_text())) == 10


def test_predict_without_any_object_names_the_option_for_the_threshold(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(folder / "detector.safetensors"), str(folder / "val2017")]
    assert main(["predict", *arguments, "--score-threshold", "0.99"]) == 0
    assert "no object has a score of at least 0.99: `lightspine evaluate` prints" in capsys.readouterr().out


def test_predict_tells_shares_as_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_image(tmp_path / "a.png", (90, 60, 200), size=(64, 48), seed=1)
    assert main(["predict", "--checkpoint", str(folder / "segmenter.safetensors"), str(image), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert sum(found["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize("network", ["detector", "segmenter", "classifier"])
def test_checkpoint_is_opened_once(
    command: str, network: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    safe_open = checkpoint_module.safe_open

    def counted_open(path: str, **options: str) -> object:
        opened.append(Path(path).name)
        return safe_open(path, **options)

    monkeypatch.setattr(checkpoint_module, "safe_open", counted_open)
    checkpoint = ["--checkpoint", str(folder / f"{network}.safetensors")]
    if command == "predict":
        assert main(["predict", *checkpoint, str(folder / "val2017" / "1.jpg")]) == 0
    else:
        # A classifier's checkpoint is opened too, although it has no COCO categories.
        assert main(["evaluate", *checkpoint, "--data", str(folder)]) == (2 if network == "classifier" else 0)
    assert opened == [f"{network}.safetensors"]


@pytest.mark.parametrize(
    ("command", "checkpoint", "flags", "sentence"),
    [
        ("evaluate", "detector", ["--flip"], "--flip is for a segmenter, but"),
        ("evaluate", "detector", ["--crop-pct", "0.9"], "--crop-pct is for a classifier, but"),
        ("evaluate", "segmenter", ["--resize", "8", "9"], "--resize is for a detector, but"),
        ("evaluate", "classifier", ["--split", "val"], "--split is for a detector or segmenter, but"),
        ("evaluate", "segmenter", ["--batch-size", "4"], "--batch-size is for a classifier or detector, but"),
        ("evaluate", "segmenter", ["--size", "64"], "--image-size is for a classifier, but"),
        ("evaluate", "segmenter", ["--multi-scale", "--ratios", "1"], "either --multi-scale or --ratios"),
        ("predict", "detector", ["--topk", "3"], "--topk is for a classifier, but"),
        ("predict", "detector", ["--flip"], "--flip is for a segmenter, but"),
        ("predict", "detector", ["--topk=5"], "--topk is for a classifier, but"),
        ("predict", "detector", ["--workers", "2"], "--workers is for a classifier, but"),
        ("predict", "classifier", ["--labels"], "--labels is for a segmenter, but"),
        ("predict", "segmenter", ["--data", "x"], "--data is for a classifier, but"),
    ],
)
def test_option_of_another_kind_of_network_is_a_wrong_call(
    command: str,
    checkpoint: str,
    flags: list[str],
    sentence: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--data", str(folder)] if command == "evaluate" else []
    assert main([command, "--checkpoint", str(folder / f"{checkpoint}.safetensors"), *data, *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_predict_of_a_folder_without_images_is_a_wrong_call(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--checkpoint", str(folder / "detector.safetensors"), str(tmp_path)]) == 2
    assert "expected images in the folder" in capsys.readouterr().err


def test_predict_without_images_is_a_wrong_call(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--checkpoint", str(folder / "detector.safetensors")]) == 2
    assert "expected image files or folders" in capsys.readouterr().err


def test_damaged_image_of_a_folder_is_skipped_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png", (90, 60, 200), size=(64, 48), seed=1)
    (tmp_path / "b.png").write_bytes(b"no image")
    command = ["predict", "--checkpoint", str(folder / "segmenter.safetensors")]
    assert main([*command, str(tmp_path)]) == 0
    assert "skipped: cannot read image" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "b.png")]) == 1
