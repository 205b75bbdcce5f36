"""Convert VOC, YOLO, LabelMe or mask datasets to the layouts that `lightspine train` reads.

VOC, YOLO and LabelMe become COCO files (annotations/instances_SPLIT.json, images in SPLIT/), masks become
label maps (images/SPLIT, annotations/SPLIT, classes.txt). What was left out or changed is counted and named.
"""

import argparse
from pathlib import Path
from typing import Any

from lightspine_cli._output import print_json, print_table, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine convert-data`."""
    formats = parser.add_subparsers(dest="format", required=True, metavar="voc|yolo|labelme|masks")
    voc = _add_format(formats, "voc", "Pascal VOC: one XML file per image, with boxes")
    voc.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: corners are pixels counted from 1, as in VOC; 0: coordinates from 0 (default: %(default)s)",
    )
    voc.add_argument(
        "--difficult",
        choices=("crowd", "keep", "drop"),
        default="crowd",
        help="what difficult objects become: crowds, which are ignored; ordinary objects; nothing "
        "(default: %(default)s)",
    )
    labelme = _add_format(formats, "labelme", "LabelMe: one JSON file per image, with polygons or rectangles")
    for named in (voc, labelme):
        named.add_argument(
            "--classes",
            type=Path,
            metavar="FILE",
            help="class names, one per line: joins names that differ in case and leaves out other classes "
            "(default: all names, sorted)",
        )
    yolo = _add_format(formats, "yolo", "YOLO: one text file per image, with boxes or polygons")
    yolo.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one per line (default: those of data.yaml)"
    )
    masks = _add_format(formats, "masks", "images with segmentation masks of any values or colors")
    masks.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="lines NAME, in the order of the values, or NAME VALUE, or NAME R G B",
    )


def _add_format(formats: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = formats.add_parser(
        name, description=description, help=description, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="IN", help="folder of the dataset")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.2,
        help="share of the images for validation if there are no splits (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of that split (default: %(default)s)")
    parser.add_argument(
        "--link", action="store_true", help="make symbolic links to the images in place of copies"
    )
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written and what was left out."""
    from lightspine.data.convert import convert_labelme, convert_masks, convert_voc, convert_yolo

    shared = {
        "class_names": args.classes,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "link": args.link,
    }
    if args.format == "voc":
        found = convert_voc(
            args.source, args.out, first_pixel=args.first_pixel, difficult=args.difficult, **shared
        )
    else:
        convert = {"yolo": convert_yolo, "labelme": convert_labelme, "masks": convert_masks}[args.format]
        found = convert(args.source, args.out, **shared)
    if args.json:
        print_json(found.as_dict())
        return 0
    if args.format == "masks":
        print_table(("split", ">images"), [(split, str(count)) for split, count in found.images.items()])
        print_table(("class", ">pixels"), [(name, f"{count:,}") for name, count in found.objects.items()])
    else:
        rows = [(split, str(count), str(found.objects[split])) for split, count in found.images.items()]
        print_table(("split", ">images", ">objects"), rows)
        print_text(f"classes: {', '.join(found.class_names)}")
    for sentence in found.issues.sentences():
        print_text(f"left out or changed: {sentence}")
    print_text(f"wrote {found.folder}; look at it with: lightspine show {found.folder} --out pictures")
    return 0
