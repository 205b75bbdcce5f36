"""Metrics gathered across two ranks with a shared image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightspine.dense.metrics import all_gather_by_image
from support.coco import content, square, write_coco
from support.processes import ROOT


@pytest.mark.slow
def test_two_processes_find_the_scores_of_all_images_each_counted_once(tmp_path: Path) -> None:
    write_coco(tmp_path, content(*(square(id=number, image_id=number) for number in (1, 2, 3)), images=3))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "support.gathered_metrics", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = {"images": [3, 3], "pixels": 3 * 64, "mIoU": 100.0, "AP": 100.0, "results": 3}
    assert reports == [expected, expected]


def test_gather_without_a_process_group_gives_the_results_back() -> None:
    assert all_gather_by_image({"a": 1}) == {"a": 1}
