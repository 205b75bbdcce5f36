"""Show details of a model of lightspine or timm, or the contents and the model of a checkpoint file."""

import argparse
from pathlib import Path
from typing import Any

from lightspine_cli._output import print_json, print_pairs, print_table, print_text, with_thousands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine info`."""
    parser.add_argument("target", metavar="NAME|FILE", help="model name or checkpoint file")
    parser.add_argument("--size", type=int, help="image size for multiply-adds (default: the published size)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the details of the model or file."""
    is_file = (
        Path(args.target).suffix in {".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".onnx"}
        or Path(args.target).exists()
    )
    facts = _file_details(Path(args.target)) if is_file else _model_details(args.target, args.size)
    if args.json:
        print_json(facts)
        return 0
    stages = facts.pop("stages", None)
    entries = facts.pop("entries", None)
    # All settings of the training run: too long for a line.
    facts.pop("run", None)
    print_pairs((name, _as_text(value)) for name, value in facts.items() if value not in (None, ""))
    if stages:
        print_text()
        print_table(
            ("stage", ">stride", ">channels", "module"),
            [(str(i), str(s["stride"]), str(s["channels"]), s["module"]) for i, s in enumerate(stages)],
        )
    if entries:
        print_text()
        print_table(
            ("entry", ">tensors", ">values", "model", "match"),
            [
                (
                    entry["name"] or "(the file itself)",
                    str(entry["tensors"]),
                    with_thousands(entry["numbers"]),
                    entry["model"] or "unknown",
                    "all tensors" if entry["exact"] else "not all, see below",
                )
                for entry in entries
            ],
        )
        for entry in entries:
            if entry["mismatches"]:
                print_text(
                    f"{entry['name'] or 'the file'} differs from {entry['model']}: {entry['mismatches']}"
                )
    return 0


def _model_details(name: str, size: int | None) -> dict[str, Any]:
    import lightspine
    from lightspine.benchmark import count_macs
    from lightspine.errors import UsageError
    from lightspine.models import find_record

    if size is not None and size < 32:
        raise UsageError(f"--size must be at least 32 pixels, got {size}")
    model: Any = lightspine.create_model(name)
    record = find_record(name)
    cfg = model.pretrained_cfg
    input_size = tuple(cfg["input_size"]) if size is None else (cfg["input_size"][0], size, size)
    macs = count_macs(model, input_size)
    published = record.published if record else None
    return {
        "name": name,
        "family": record.family if record else f"{type(model).__name__} (timm)",
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "input_size": list(input_size),
        "macs": macs.total,
        "macs_conv": macs.conv,
        "macs_matmul": macs.matmul,
        "macs_scan": macs.scan,
        "published_macs_g": published.macs_g if published else None,
        "published_top1": published.top1 if published else None,
        "published_note": published.note if published else "",
        "published_in": published.source if published else "",
        "num_features": model.num_features,
        "num_classes": model.num_classes,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "crop_pct": cfg["crop_pct"],
        "stages": _stages(model),
    }


def _stages(model: Any) -> list[dict[str, Any]]:
    # timm's models without stages have no feature_info, or an empty one.
    info = getattr(model, "feature_info", None) or []
    return [{"stride": s["reduction"], "channels": s["num_chs"], "module": s["module"]} for s in info]


def _file_details(path: Path) -> dict[str, Any]:
    from lightspine.export.onnx_network import is_onnx_file, read_onnx_metadata
    from lightspine.models.checkpoint import read_checkpoint
    from lightspine.models.factory import identify_entry

    file = read_onnx_metadata(path) if is_onnx_file(path) else read_checkpoint(path)
    facts: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size}
    if file.is_dense:
        return facts | _saved_details(file)
    entries = []
    for name, tensors in file.entries.items():
        guess = identify_entry(file, name)
        entries.append(
            {
                "name": name,
                "tensors": len(tensors),
                "numbers": sum(tensor.numel() for tensor in tensors.values()),
                "model": guess.name if guess else None,
                "family": guess.family if guess else None,
                "exact": guess.exact if guess else False,
                "mismatches": guess.mismatches if guess else "",
            }
        )
    return facts | _saved_details(file) | {"entries": entries}


def _saved_details(file: Any) -> dict[str, Any]:
    """Return what a file says about its model and its training run."""
    from lightspine.dense.checkpoint import read_network_metadata
    from lightspine.models.metadata import read_model_metadata

    about: Any
    if file.is_dense:
        about = read_network_metadata(file)
        facts = {
            "saved_as": f"{about.head} over {about.model}",
            "layout": "OpenMMLab" if file.is_openmmlab else None,
            "task": about.kind,
            "num_classes": about.num_classes,
            "arguments": about.options,
            "settings": about.settings,
        }
    else:
        about = read_model_metadata(file)
        if about is None:
            return {}
        facts = {"saved_as": about.name, "arguments": about.kwargs}
    run = dict(about.run)
    split = run.get("data") or {}
    return facts | {
        "classes": about.class_names,
        "preprocessing": about.preprocessing,
        "recipe": run.get("recipe"),
        "held_out": None
        if split.get("val_fraction") is None
        else f"{split['val_fraction']:g} of the images with seed {split['seed']}",
        "metadata": about.metadata,
        "run": run,
    }


def _as_text(value: Any) -> str:
    if isinstance(value, int):
        return with_thousands(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        shown = ", ".join(str(item) for item in value[:10])
        return f"{shown}, ... ({len(value)})" if len(value) > 10 else shown
    return str(value)
