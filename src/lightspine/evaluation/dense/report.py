"""What an evaluation of a detector or segmenter leaves in its folder."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from lightspine.atomic import write_whole
from lightspine.errors import UsageError


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
    folder = Path(folder)
    if folder.is_file():
        raise UsageError(f"expected a folder for the report, but {folder} is a file")
    contents: dict[str, str | None] = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "classes.csv": _csv(_class_rows(report)),
        "skipped.csv": _csv([["path", "reason"], *map(list, report["skipped"].items())])
        if report["skipped"]
        else None,
    }
    written = {}
    for name, content in contents.items():
        path = folder / name
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, content)
            written[name] = path
    picture = folder / "confusion.png"
    picture.unlink(missing_ok=True)
    # Imported here: half a second that predictions need not pay.
    from lightspine.evaluation.plots import MOST_CLASSES, plot_confusion

    if "confusion" in report and len(report["confusion"]) <= MOST_CLASSES:
        title = (
            f"{report['head']} over {report['model']}: mIoU {report['scores']['mIoU']:.2f} %, share of pixels"
        )
        plot_confusion(
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


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in row])
    return text.getvalue()
