"""File names that are not ASCII under a locale that is."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from support.coco import content, square

# Python turns to UTF-8 by itself under LC_ALL=C, unless it is told not to.
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

_SCRIPT = """
import sys
from pathlib import Path
from lightspine.data import FileSource, scan_image_folder, split_image_list
from lightspine.data.detection import read_coco
from lightspine.evaluation.batch_inference.sources import open_images
root = Path(sys.argv[1])
splits = scan_image_folder(root / "folder", val_fraction=0.5)
listed = split_image_list(root / "list.csv", val_fraction=0.5)
coco = read_coco(root / "coco.json", root / "folder" / sys.argv[2])
inference = open_images(root / "folder", root / "listing")
for source in (FileSource(splits.train), FileSource(listed.val), inference):
    source.open(0)
assert coco.path(0).is_file()
print(ascii([splits.class_names, listed.class_names, sys.getfilesystemencoding()]))
"""


@pytest.mark.slow
def test_names_that_are_not_ascii_are_found_under_an_ascii_locale(tmp_path: Path) -> None:
    names = ("Ärzte", "日本")
    for name in names:
        (tmp_path / "folder" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 48)).save(tmp_path / "folder" / name / f"é{number}.png")
    with (tmp_path / "list.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [(f"folder/{name}/é{number}.png", name) for name in names for number in range(2)]
        csv.writer(file).writerows([("path", "label"), *rows])
    described = content(square())
    described["images"][0]["file_name"] = "é0.png"
    (tmp_path / "coco.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path), names[0]],
        env=os.environ | ASCII_LOCALE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ascii([sorted(names), sorted(names), "ascii"])
