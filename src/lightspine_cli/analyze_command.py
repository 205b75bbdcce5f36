"""Draw receptive fields, class activation maps, attention maps and head similarity of a model.

  erf         effective receptive field, before and after training (any model)
  cam         Grad-CAM and activation maps of the stages (any model)
  attention   attention map of one pixel (VMamba, Vim, SHViT, EfficientMod, transformers)
  context     channel means of the context layers (EfficientMod)
  importance  importance of each position for the hidden state (EfficientViM)
  redundancy  similarity of attention heads, and accuracy with each head removed (multi-head models)

Writes NAME.png, NAME.svg and NAME.npz per image to --out, and a contact sheet for several images.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspine_cli._output import print_text

if TYPE_CHECKING:
    from lightspine.analysis import ImageResult, ModelHandle

KINDS = ("erf", "cam", "attention", "context", "importance", "redundancy")

_KINDS_OF_OPTION = {
    "query": ("attention",),
    "class": ("cam",),
    "stage": ("erf", "cam", "attention", "context", "importance"),
    "data": ("redundancy",),
}
_MAX_SHEET_ROWS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine analyze`."""
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("model", metavar="MODEL", help="a checkpoint file, or the name of a model")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files or folders")
    parser.add_argument(
        "--checkpoint", type=Path, help="weights file, if MODEL is a name (default: random weights)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--query",
        metavar="Y,X|class",
        help="attention: a pixel of the preprocessed image (default: its center), or the class token",
    )
    parser.add_argument("--stage", type=int, metavar="N", help="index of a stage, from 0")
    parser.add_argument(
        "--class", metavar="NAME", help="cam: the class to explain (default: the predicted one)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="redundancy: labeled images (CLASS/*) for the ablation",
    )
    parser.add_argument(
        "--size", metavar="HxW|native", help="input size in pixels (default: that of the checkpoint)"
    )
    parser.add_argument("--device", default="cpu", help="PyTorch device (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the analysis, write its figures and arrays, and print their paths."""
    from lightspine.analysis import expand_image_paths, open_model
    from lightspine.errors import UsageError

    for option, kinds in _KINDS_OF_OPTION.items():
        if getattr(args, option) is not None and args.kind not in kinds:
            raise UsageError(f"--{option} is only for {', '.join(kinds)}, got {args.kind}")
    if args.out.is_file():
        raise UsageError(f"expected a folder for --out, got the file {args.out}")
    query, files = _parse_query(args.query), expand_image_paths(args.images)
    # Outputs are named after the images and would overwrite them in their own folder.
    if beside := [file for file in files if file.resolve().parent == args.out.resolve()]:
        raise UsageError(f"expected --out to be another folder than that of the image {beside[0]}")
    handle = open_model(args.model, args.checkpoint, size=_parse_size(args.size), device=args.device)
    if args.kind in ("erf", "redundancy"):
        return _run_on_all(args, handle, files)
    return _run_on_each(args, handle, files, query)


def _run_on_all(args: argparse.Namespace, handle: "ModelHandle", files: list[Path]) -> int:
    """Run an analysis that averages over the images."""
    from lightspine.analysis import erf, redundancy
    from lightspine.utils.progress import progress_bar

    result: Any
    if args.kind == "erf":
        result = erf(handle, progress_bar(files, "erf"), stage=args.stage)
        for field in result.fields:
            print_text(f"{field.state}: half of the contribution within {field.side_of(0.5)} px")
    else:
        labelled = [] if args.data is None else _labeled_images(args.data, handle)
        result = redundancy(handle, files, labelled=labelled, bar=progress_bar)
        for module, cosine in zip(result.modules, result.mean_similarity(), strict=True):
            print_text(f"{module}: mean cosine similarity of two heads {cosine:.3f}")
    _write(result, args.out / args.kind)
    return 0


def _run_on_each(args: argparse.Namespace, handle: "ModelHandle", files: list[Path], query: Any) -> int:
    from lightspine.analysis import attention, cam, context, draw_results, importance, save_figure
    from lightspine.utils.progress import progress_bar

    functions: dict[str, Any] = {
        "cam": lambda image: cam(handle, [image], stage=args.stage, target=getattr(args, "class")),
        "attention": lambda image: attention(handle, [image], query=query, stage=args.stage),
        "context": lambda image: context(handle, [image], stage=args.stage),
        "importance": lambda image: importance(handle, [image], stage=args.stage),
    }
    names = _output_names(files)
    on_sheet: list[ImageResult] = []
    for file in progress_bar(files, args.kind):
        (result,) = functions[args.kind](file)
        _write(result, args.out / names[file], verbose=len(files) == 1)
        if len(on_sheet) < _MAX_SHEET_ROWS:
            on_sheet.append(result)
    if len(files) > 1:
        save_figure(
            draw_results(on_sheet, [names[file] for file in files[: len(on_sheet)]]),
            args.out / "contact_sheet",
        )
        print_text(
            f"wrote maps of {len(files)} images to {args.out}, {len(on_sheet)} of them on contact_sheet.png"
        )
    print_text(f"{handle.name}, {handle.state}; {on_sheet[0].image.note}")
    return 0


def _write(result: Any, base: Path, *, verbose: bool = True) -> None:
    from lightspine.analysis import save_arrays, save_figure

    written = [*save_figure(result.figure(), base), save_arrays(result.arrays(), base)]
    for path in written if verbose else ():
        print_text(f"wrote {path}")


def _output_names(files: list[Path]) -> dict[Path, str]:
    """Return the output name of each file: its stem, with the folder name if the stem is not unique."""
    stems = [file.stem for file in files]
    named: dict[Path, str] = {}
    for file in files:
        name = file.stem if stems.count(file.stem) == 1 else f"{file.parent.name}_{file.stem}"
        while name in named.values() or name == "contact_sheet":
            name += "_"
        named[file] = name
    return named


def _labeled_images(folder: Path, handle: "ModelHandle") -> Any:
    from lightspine.data import list_images

    return list_images(folder, handle.class_names)[1]


def _parse_query(text: str | None) -> Any:
    from lightspine.errors import UsageError

    if text is None or text == "class":
        return text
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"expected --query as Y,X in pixels or class, got {text!r}")
    return int(parts[0]), int(parts[1])


def _parse_size(text: str | None) -> Any:
    from lightspine.errors import UsageError

    if text is None or text == "native":
        return text
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise UsageError(f"expected --size as HxW or N in pixels, or native, got {text!r}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))
