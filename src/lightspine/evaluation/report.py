"""Report files of an evaluation."""

import csv
import hashlib
import io
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightspine._version import __version__
from lightspine.errors import UsageError
from lightspine.utils.files import atomic_write_text

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "pillow", "faster-coco-eval")


def describe_software() -> dict[str, str]:
    """Return the versions that a score depends on."""
    return {"lightspine": __version__, "python": platform.python_version()} | {
        name: version(name) for name in _PACKAGES
    }


def describe_device(device: str) -> str:
    """Return the device and, of a GPU, its name."""
    kind = torch.device(device)
    return f"{device} ({torch.cuda.get_device_name(kind)})" if kind.type == "cuda" else device


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_report(report: dict[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write the files of an evaluation; the folder is made.

    - `report.json`: the report;
    - `classes.csv`: one row per class, with what it is most often taken for; not where images have several
      right classes;
    - `confusion.png`: with 50 classes or fewer;
    - `skipped.csv`: the images that could not be used, if any.

    Args:
        report: what `evaluate` returned.
        folder: where the files go; those of an earlier evaluation are replaced or removed.

    Returns:
        File name -> path of what was written.

    Raises:
        UsageError: the folder is a file.
        LightspineError: a file cannot be written.
    """
    written = write_files(
        folder,
        {
            "report.json": json.dumps(report, indent=2) + "\n",
            "classes.csv": _classes_csv(report["classes"]),
            "skipped.csv": skipped_csv(report["skipped"]),
        },
    )
    folder = Path(folder)
    picture = folder / "confusion.png"
    picture.unlink(missing_ok=True)
    # Imported here: half a second that predictions need not pay.
    from lightspine.evaluation.plots import MOST_CLASSES, plot_confusion_matrix

    if report["confusion"] is not None and len(report["confusion"]) <= MOST_CLASSES:
        title = f"{report['model']}: {report['top1']:.2f} % of {report['images']} images right"
        plot_confusion_matrix(report["confusion"], list(report["classes"]), picture, title=title)
        written[picture.name] = picture
    return written


def write_files(folder: str | Path, contents: Mapping[str, str | None]) -> dict[str, Path]:
    """Write files into a folder, which is made; those without a content are removed.

    Args:
        folder: where they go.
        contents: file name -> text.

    Returns:
        File name -> path of what was written.

    Raises:
        UsageError: the folder is a file.
        LightspineError: a file cannot be written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UsageError(f"expected a folder for the report, but {folder} is a file")
    written = {}
    for name, content in contents.items():
        path = folder / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            atomic_write_text(path, content)
            written[name] = path
    return written


def skipped_csv(skipped: Mapping[str, str]) -> str | None:
    """Return a table of path and reason, or None where nothing was skipped."""
    return to_csv([("path", "reason"), *skipped.items()]) if skipped else None


def to_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as CSV, numbers that are not whole with four digits behind the point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in row])
    return text.getvalue()


def _classes_csv(classes: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    if classes is None:
        return None
    columns = list(next(iter(classes.values())))
    rows = [[number, name, *entry.values()] for number, (name, entry) in enumerate(classes.items())]
    return to_csv([("class", "name", *columns), *rows])


def write_dense_report(report: dict[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write the files of an evaluation; the folder is made.

    - `report.json`: the report;
    - `classes.csv`: one row per class;
    - `confusion.png`: of a segmenter with 50 classes or fewer;
    - `skipped.csv`: the images that could not be used, if any.

    Args:
        report: what `evaluate_detector` or `evaluate_segmenter` returned.
        folder: where the files go; those of an earlier evaluation are replaced or removed.

    Returns:
        File name -> path of what was written.

    Raises:
        UsageError: the folder is a file.
        LightspineError: a file cannot be written.
    """
    written = write_files(
        folder,
        {
            "report.json": json.dumps(report, indent=2) + "\n",
            "classes.csv": to_csv(_class_rows(report)),
            "skipped.csv": skipped_csv(report["skipped"]),
        },
    )
    folder = Path(folder)
    picture = folder / "confusion.png"
    picture.unlink(missing_ok=True)
    # Imported here: half a second that predictions need not pay.
    from lightspine.evaluation.plots import MOST_CLASSES, plot_confusion_matrix

    if "confusion" in report and len(report["confusion"]) <= MOST_CLASSES:
        title = (
            f"{report['head']} over {report['model']}: mIoU {report['scores']['mIoU']:.2f} %, share of pixels"
        )
        plot_confusion_matrix(
            report["confusion"],
            [row["name"] for row in report["classes"]],
            picture,
            title=title,
            counted="pixels",
        )
        written[picture.name] = picture
    return written


def _class_rows(report: dict[str, Any]) -> list[list[Any]]:
    classes = report["classes"]
    if isinstance(classes, list):
        return [list(classes[0]), *(list(row.values()) for row in classes)]
    kinds = list(report["scores"])
    header = ["class", "name", *(f"{kind}_AP" for kind in kinds)]
    return [
        header,
        *([number, name, *scores.values()] for number, (name, scores) in enumerate(classes.items())),
    ]
