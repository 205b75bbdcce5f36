"""`lightspine train` for detectors and segmenters."""

from pathlib import Path

import pytest
import timm
from PIL import Image

from lightspine.dense import load_network
from lightspine.errors import UsageError
from lightspine.evaluation import evaluate_segmenter
from lightspine.training.cli import main
from support.coco import content, square, write_coco
from support.dense_runs import SMALL_MODEL
from support.images import write_image
from support.training import same_weights

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=1",
    "--data.num_workers=0",
    "--data.batch_size=2",
    f"--model.model={SMALL_MODEL}",
    "--model.model_args={out_indices: [1, 2, 3, 4]}",
    "--model.channels=16",
]


def detection_flags(folder: Path) -> list[str]:
    objects = [square(id=number, image_id=number) for number in range(1, 5)]
    file = write_coco(folder, content(*objects, images=4))
    places = [f"--data.{split}_annotations={file}" for split in ("train", "val")]
    places += [f"--data.{split}_images={folder}" for split in ("train", "val")]
    return [
        "--model=DetectionTask",
        "--model.head=retinanet",
        "--model.resize=null",
        "--data=CocoDataModule",
        f"--data.root={folder}",
        "--data.masks=false",
        "--data.shorter=64",
        *places,
        *QUICK,
    ]


def segmentation_flags(folder: Path) -> list[str]:
    for number in range(4):
        write_image(folder / "images" / f"{number}.jpg", (90, 60, 200), size=(64, 48), seed=number)
        path = folder / "labels" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((64, 48)).point(lambda value: int(value > 100)).save(path)
    (folder / "classes.txt").write_text("sky\nsea\n")
    return [
        "--model=SegmentationTask",
        "--model.head=semantic_fpn",
        "--data=SegmentationFolderDataModule",
        f"--data.root={folder}",
        "--data.crop=[32, 32]",
        "--data.scale=[64, 48]",
        "--data.val_scale=null",
        *QUICK,
    ]


def test_detector_is_trained_from_flags_alone(tmp_path: Path) -> None:
    result = main([*detection_flags(tmp_path / "data"), "--seed=4", "--folder", str(tmp_path / "run")])
    saved = load_network(result.weights)[1]
    assert saved.class_names == ["cat", "dog"]
    # All settings of the run are in the file.
    config = saved.run["config"]
    assert (saved.run["seed"], config["trainer"]["max_epochs"]) == (4, 1)
    assert config["data"]["init_args"]["shorter"] == 64


def test_segmenter_is_trained_from_flags_alone_with_the_models_preprocessing(tmp_path: Path) -> None:
    result = main([*segmentation_flags(tmp_path / "data"), "--folder", str(tmp_path / "run")])
    saved = load_network(result.weights)[1]
    published = timm.get_pretrained_cfg(SMALL_MODEL)
    assert saved.class_names == ["sky", "sea"]
    assert saved.preprocessing == {"mean": list(published.mean), "std": list(published.std)}


@pytest.mark.parametrize("flags", [detection_flags, segmentation_flags], ids=["detector", "segmenter"])
def test_recorded_config_trains_the_same_run(flags: object, tmp_path: Path) -> None:
    first = main([*flags(tmp_path / "data"), "--seed=5", "--folder", str(tmp_path / "a")])  # type: ignore[operator]
    again = main(["--config", str(first.folder / "config.yaml"), "--folder", str(tmp_path / "b")])
    assert same_weights(first.weights, again.weights)


def test_run_is_called_by_head_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = main([*detection_flags(tmp_path / "data"), "--trainer.limit_train_batches=1"])
    assert result.folder == Path("runs", f"retinanet_{SMALL_MODEL}")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.head=yolo", "invalid argument model.head: .*'retinanet', 'mask_rcnn', 'cascade_mask_rcnn'"),
        ("--model.wings=3", "Option 'wings' is not accepted"),
        ("--data.augmentation=fog", "invalid argument data.augmentation: .*'large_scale_jitter'"),
        ("--data.val_annotations=nothing.json", "expected a COCO file, but nothing.json does not exist"),
        ("--model.frozen_stages=1", "frozen stages of test_efficientnet would keep random weights"),
        ("--data.masks=true", "expected data with masks=false for retinanet over test_efficientnet"),
        ("--model.anchor_scale=-1", "anchor_scale must be above 0, got -1"),
    ],
)
def test_wrong_flag_is_named_in_one_line(flag: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        main([*detection_flags(tmp_path / "data"), flag, "--folder", str(tmp_path / "run")])
    assert "\n" not in str(raised.value)


def test_wrong_schedule_names_the_schedules_and_their_fields(tmp_path: Path) -> None:
    flags = [*detection_flags(tmp_path / "data"), "--model.schedule={steps: 10, wings: 2}"]
    with pytest.raises(
        UsageError, match=r"CosineSchedule \(epochs, .*MilestoneSchedule \(milestones, .*steps"
    ):
        main([*flags, "--folder", str(tmp_path / "run")])


def test_label_maps_that_were_remapped_in_training_are_so_in_the_evaluation(tmp_path: Path) -> None:
    flags = segmentation_flags(tmp_path / "data")
    for path in (tmp_path / "data" / "labels").iterdir():
        Image.open(path).point(lambda value: 255 * value).save(path)
    remap = "--data.remap={0: 0, 255: 1}"
    result = main([*flags, remap, "--data.ignored=null", "--folder", str(tmp_path / "run")])
    report = evaluate_segmenter(result.weights, tmp_path / "data")
    assert report["scores"]["mIoU"] == pytest.approx(result.score, abs=1e-3)
