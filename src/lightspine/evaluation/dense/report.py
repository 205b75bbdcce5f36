"""What an evaluation of a detector or segmenter leaves in its folder."""

import json
from pathlib import Path
from typing import Any

from lightspine.evaluation.report import skipped_csv, to_csv, write_files


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
