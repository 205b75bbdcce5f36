"""Evaluation reports: JSON, per-class CSV and the confusion matrix as PNG."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightspine.errors import UsageError
from lightspine.utils.files import atomic_write_text
from lightspine.utils.printable import printable

_PICTURE = "confusion.png"


def write_report(report: dict[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write the evaluation report of a classifier; creates the folder.

    - `report.json`: the report;
    - `classes.csv`: one row per class, unless images have several correct classes;
    - `confusion.png`: if the report has a confusion matrix;
    - `skipped.csv`: images that could not be used, if any.

    Args:
        report: from `evaluate`.
        folder: output folder; files of an earlier evaluation are replaced or removed.

    Returns:
        File name -> path of the written files.

    Raises:
        UsageError: the folder is a file.
        LightspineError: a file cannot be written.
    """
    classes = report["classes"]
    rows = None
    if classes is not None:
        columns = list(next(iter(classes.values())))
        rows = [["class", "name", *columns]]
        rows += [[number, name, *entry.values()] for number, (name, entry) in enumerate(classes.items())]
    written = _write_tables(report, rows, folder)
    if report["confusion"] is not None:
        title = f"{report['model']}: {report['top1']:.2f} % of {report['images']} images correct"
        written |= _write_picture(folder, report["confusion"], list(classes), title, "images")
    return written


def write_dense_report(report: dict[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write the evaluation report of a detector or segmenter; creates the folder.

    - `report.json`: the report;
    - `classes.csv`: one row per class;
    - `confusion.png`: segmenters only;
    - `skipped.csv`: images that could not be used, if any.

    Args:
        report: from `evaluate_detector` or `evaluate_segmenter`.
        folder: output folder; files of an earlier evaluation are replaced or removed.

    Returns:
        File name -> path of the written files.

    Raises:
        UsageError: the folder is a file.
        LightspineError: a file cannot be written.
    """
    classes = report["classes"]
    if isinstance(classes, list):
        rows = [list(classes[0]), *(list(row.values()) for row in classes)]
    else:
        rows = [["class", "name", *(f"{kind}_AP" for kind in report["scores"])]]
        rows += [[number, name, *scores.values()] for number, (name, scores) in enumerate(classes.items())]
    written = _write_tables(report, rows, folder)
    if "confusion" in report:
        title = f"{report['head']} over {report['model']}: mIoU {report['scores']['mIoU']:.2f} %"
        names = [row["name"] for row in classes]
        written |= _write_picture(folder, report["confusion"], names, title, "pixels")
    return written


def to_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Format rows as CSV: floats with four decimals, None as an empty cell, control characters escaped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([_format_cell(value) for value in row])
    return text.getvalue()


def _format_cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4f}"
    return printable(value) if isinstance(value, str) else value


def _write_tables(
    report: Mapping[str, Any], class_rows: Sequence[Sequence[Any]] | None, folder: str | Path
) -> dict[str, Path]:
    """Write the text files, and remove all files of an earlier report."""
    folder = Path(folder)
    if folder.is_file():
        raise UsageError(f"expected a folder for the report, but {folder} is a file")
    skipped = report["skipped"]
    contents = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "classes.csv": None if class_rows is None else to_csv(class_rows),
        "skipped.csv": to_csv([("path", "reason"), *skipped.items()]) if skipped else None,
        _PICTURE: None,
    }
    written = {}
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            atomic_write_text(folder / name, content)
            written[name] = folder / name
    return written


def _write_picture(
    folder: str | Path, confusion: Any, names: Sequence[str], title: str, unit: str
) -> dict[str, Path]:
    # matplotlib takes half a second to import.
    from lightspine.evaluation.draw import draw_confusion_matrix

    path = Path(folder) / _PICTURE
    draw_confusion_matrix(confusion, names, path, title=title, unit=unit)
    return {_PICTURE: path}
