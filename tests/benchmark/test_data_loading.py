"""Benchmark of data loading: rows, rates, and folders that cannot be measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.benchmark.data_loading import measure_loading
from lightspine.data.gpu_decoding import JpegDecoder
from lightspine.errors import LightspineError, UsageError
from support.images import truncate, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", count=4, splits=("train", "val"))


def test_decoding_and_every_number_of_workers_have_a_row_of_whole_batches(folder: Path) -> None:
    steps: list[str] = []
    report = measure_loading(folder, size=32, workers=(0, 1), batch=8, images=30, on_step=steps.append)
    rows = [(row.part, row.workers, row.images) for row in report.rows]
    # A folder of 12 images is repeated.
    assert rows == [("decode", 0, 30), ("load", 0, 24), ("load", 1, 24)]
    assert len(steps) == 3


def test_rates_are_images_by_wall_clock_and_by_processor_time(folder: Path) -> None:
    report = measure_loading(folder, size=32, workers=(0,), batch=4, images=12)
    for row in report.rows:
        assert row.images_per_s == pytest.approx(row.images / row.seconds)
        assert row.images_per_core_s == pytest.approx(row.images / row.cpu_seconds)


def test_processor_time_includes_that_of_the_workers(folder: Path) -> None:
    report = measure_loading(folder, size=512, augmentation="strong", workers=(1,), batch=4, images=24)
    alone = measure_loading(folder, size=512, augmentation="strong", workers=(0,), batch=4, images=24)
    assert report.rows[1].cpu_seconds > 0.5 * alone.rows[1].cpu_seconds


def test_damaged_image_is_named(folder: Path) -> None:
    truncate(folder / "train" / "red" / "0.jpg")
    with pytest.raises(LightspineError, match=r"red/0\.jpg"):
        measure_loading(folder, size=32, workers=(0,), batch=4, images=24)


def test_row_of_loading_decodes_where_training_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[JpegDecoder] = []

    def on_cpu(*arguments: Any) -> JpegDecoder:
        made.append(JpegDecoder(*arguments, device_type="cpu"))
        return made[-1]

    monkeypatch.setattr("lightspine.data.modules.classification.JpegDecoder", on_cpu)
    report = measure_loading(folder, size=32, workers=(0,), batch=8, images=24, decode="cuda")
    assert report.decode == "cuda"
    assert [row.images for row in report.rows] == [24, 24]
    assert len(made) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_decoding_without_cuda_device_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="decode=cuda needs a CUDA device"):
        measure_loading(folder, workers=(0,), batch=8, images=24, decode="cuda")


def test_too_few_images_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="at least two batches of 8 images, got 15"):
        measure_loading(folder, workers=(0,), batch=8, images=15)
