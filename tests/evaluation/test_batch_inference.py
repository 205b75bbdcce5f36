"""Batch inference: every image exactly once, also after failures and resumes."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation import InferenceOptions, predict, predict_images
from lightspine.evaluation.batch_inference import storage
from lightspine.utils import folder_lock
from lightspine.utils.folder_lock import lock_folder
from support.checkpoints import save_small
from support.images import COLOURS, truncate, write_folder, write_image

SMALL_PARTS = InferenceOptions(part_size=4, batch_size=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("bulk") / "colours.safetensors", classes=list(COLOURS))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", count=5)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_rows_are_what_single_predictions_say(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    predict_images(checkpoint, images, tmp_path / "out", topk=2, options=SMALL_PARTS)
    rows = read_rows(tmp_path / "out" / "predictions.csv")
    single = predict(checkpoint, [images / row["path"] for row in rows], topk=2)
    assert [(row["name_1"], row["name_2"]) for row in rows] == [
        tuple(score.name for score in prediction.classes) for prediction in single
    ]
    assert [float(row["probability_1"]) for row in rows] == pytest.approx(
        [prediction.classes[0].probability for prediction in single], rel=1e-4
    )


def test_every_image_has_one_row_in_order(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    found = [row["path"] for row in read_rows(tmp_path / "out" / "predictions.csv")]
    assert found == [f"{name}/{i}.jpg" for name in sorted(COLOURS) for i in range(5)]


def test_bad_images_are_named_apart(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    truncate(write_image(images / "red" / "2.jpg", (9, 9, 9), size=(99, 99)))
    (images / "blue" / "1.jpg").write_bytes(b"no image")
    outcome = predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    bad = read_rows(tmp_path / "out" / "bad_images.csv")
    assert [row["path"] for row in bad] == ["blue/1.jpg", "red/2.jpg"]
    assert "it is not an image" in bad[0]["reason"]
    assert (outcome["images"], outcome["bad"]) == (15, 2)
    assert len(read_rows(tmp_path / "out" / "predictions.csv")) == 13


def test_part_of_bad_images_only_is_no_obstacle(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    for i in range(5):
        (images / "blue" / f"{i}.jpg").write_bytes(b"")
    predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    assert len(read_rows(tmp_path / "out" / "predictions.csv")) == 10


def test_odd_file_names_come_back_with_control_characters_escaped(checkpoint: Path, tmp_path: Path) -> None:
    names = ['a,"b".png', "c\nd.png", os.fsdecode(b"\xff.png")]
    for name in names:
        write_image(tmp_path / "plain.png", (1, 2, 3)).rename(tmp_path / name)
    predict_images(checkpoint, tmp_path, tmp_path / "out")
    expected = ['a,"b".png', "c\\nd.png", os.fsdecode(b"\xff.png")]
    assert sorted(row["path"] for row in read_rows(tmp_path / "out" / "predictions.csv")) == sorted(expected)


def test_shards_give_the_rows_of_their_folder(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, name in enumerate(sorted(COLOURS)):
        with tarfile.open(shards / f"part-{number}.tar", "w") as archive:
            for file in sorted((images / name).iterdir()):
                data = file.read_bytes()
                info = tarfile.TarInfo(f"{name}-{file.name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    predict_images(checkpoint, images, tmp_path / "one", options=SMALL_PARTS)
    predict_images(checkpoint, shards, tmp_path / "two", options=SMALL_PARTS)
    rows, from_shards = (read_rows(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert from_shards[7].pop("path") == f"{shards}/part-1.tar/green-2.jpg"
    assert rows[7].pop("path") == "green/2.jpg"
    assert [list(row.values())[-9:] for row in rows] == [list(row.values())[-9:] for row in from_shards]


def test_failure_on_the_way_can_be_resumed(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_images(checkpoint, images, tmp_path / "whole", options=SMALL_PARTS)
    _fail_at_part(2, monkeypatch)
    with pytest.raises(LightspineError, match="disk full"):
        predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    monkeypatch.undo()
    resumed = InferenceOptions(part_size=4, batch_size=3, resume=True)
    outcome = predict_images(checkpoint, images, tmp_path / "out", options=resumed)
    assert (outcome["computed"], outcome["images"]) == (7, 15)
    whole, again = (tmp_path / name / "predictions.csv" for name in ("whole", "out"))
    assert again.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out" / "parts").exists()


def test_listing_is_fixed_when_a_run_begins(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at_part(1, monkeypatch)
    with pytest.raises(LightspineError, match="disk full"):
        predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    monkeypatch.undo()
    write_image(images / "blue" / "00.jpg", (0, 0, 0))
    (images / "red" / "4.jpg").unlink()
    resumed = InferenceOptions(part_size=4, batch_size=3, resume=True)
    outcome = predict_images(checkpoint, images, tmp_path / "out", options=resumed)
    assert (outcome["images"], outcome["bad"]) == (15, 1)


def test_unfinished_run_is_not_begun_anew_unasked(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at_part(1, monkeypatch)
    for message in ("disk full", "holds an unfinished run: resume it or remove it"):
        with pytest.raises(LightspineError, match=message):
            predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)


def test_other_settings_are_not_resumed(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at_part(1, monkeypatch)
    with pytest.raises(LightspineError, match="disk full"):
        predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="has part_size 4, got 5"):
        predict_images(
            checkpoint, images, tmp_path / "out", options=InferenceOptions(part_size=5, resume=True)
        )


def test_finished_run_stays_as_it_is(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    first = predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    with pytest.raises(UsageError, match="holds a finished run"):
        predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    resumed = InferenceOptions(part_size=4, batch_size=3, resume=True)
    assert predict_images(checkpoint, images, tmp_path / "out", options=resumed) == first
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == first


def test_values_that_are_not_finite_are_bad_images(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from lightspine.evaluation.batch_inference import outputs

    softmax = torch.Tensor.softmax

    def broken(logits: torch.Tensor, dim: int) -> torch.Tensor:
        values = softmax(logits, dim=dim).clone()
        values[0] = torch.nan
        return values

    monkeypatch.setattr(outputs.Tensor, "softmax", broken)
    options = InferenceOptions(batch_size=15)
    assert predict_images(checkpoint, images, tmp_path / "out", options=options)["bad"] == 1
    [row] = read_rows(tmp_path / "out" / "bad_images.csv")
    assert row == {"path": "blue/0.jpg", "reason": "the model gives values that are not finite"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices of at least 1, got 0"),
        ({"part_size": 0}, "part_size of at least 1, got 0"),
        ({"devices": 2, "device": "cuda:0"}, "expected a device type"),
    ],
)
def test_option_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InferenceOptions(**options)  # type: ignore[arg-type]


def test_folder_without_images_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a folder of images or shards, but .* has none"):
        predict_images(checkpoint, tmp_path, tmp_path / "out")


def test_parquet_without_pyarrow_is_refused(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="expected the package pyarrow for Parquet files"):
        predict_images(checkpoint, images, tmp_path / "out", format="parquet")


def test_parquet_holds_the_same_as_csv(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    (images / "red" / "4.jpg").write_bytes(b"")
    predict_images(checkpoint, images, tmp_path / "csv", options=SMALL_PARTS)
    predict_images(checkpoint, images, tmp_path / "parquet", format="parquet", options=SMALL_PARTS)
    rows = read_rows(tmp_path / "csv" / "predictions.csv")
    columns = parquet.read_table(tmp_path / "parquet" / "predictions.parquet").to_pydict()
    assert columns["path"] == [row["path"] for row in rows]
    assert columns["name_1"] == [row["name_1"] for row in rows]
    assert np.allclose(columns["probability_3"], [float(row["probability_3"]) for row in rows], rtol=1e-4)


def _fail_at_part(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part = storage.RunFolder.write_part

    def failing(self: storage.RunFolder, part: int, *rest: object) -> None:
        if part == number:
            raise LightspineError("disk full")
        write_part(self, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(storage.RunFolder, "write_part", failing)


def test_folder_that_another_process_writes_is_refused(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.1)
    (tmp_path / "out").mkdir()
    with (
        lock_folder(tmp_path / "out"),
        pytest.raises(LightspineError, match="another process is writing to"),
    ):
        predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    predict_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    assert len(read_rows(tmp_path / "out" / "predictions.csv")) == 15
