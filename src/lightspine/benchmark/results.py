"""Result file of `lightspine bench`: its dataclasses, writing and validated reading.

`results.json` has the same format for a finished and an interrupted run. A row is one model in one mode,
dtype, batch size and image size; a row that could not be measured has the reason. `results.csv` has the same
rows as a flat table.
"""

import csv
import io
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.errors import LightspineError
from lightspine.utils.files import atomic_write_text, parse_json
from lightspine.utils.printable import printable

FORMAT = 1
RESULTS_NAME, TABLE_NAME = "results.json", "results.csv"

Source = Literal["lightspine", "timm"]
Mode = Literal["eager", "optimized", "compile", "onnx", "runtime"]
EXPORTED_MODES = ("onnx", "runtime")
Status = Literal["ok", "out_of_memory", "failed", "absent"]


@dataclass(frozen=True, kw_only=True)
class PublishedFigures:
    """Figures published by the authors, `None` if not published; not measured with this library.

    Attributes:
        top1: ImageNet-1k top-1 accuracy in percent.
        throughput: images per second.
        throughput_device: device and batch size of the throughput.
        macs_g: multiply-adds in 10^9; the papers call them FLOPs.
        params_m: parameters in millions.
        source: where the figures are published.
    """

    top1: float | None = None
    throughput: float | None = None
    throughput_device: str | None = None
    macs_g: float | None = None
    params_m: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one mode, dtype, batch size and image size.

    Attributes:
        model: registered name, or the paper's name of a model that is not available.
        source: "lightspine" or "timm".
        variant: name of a configuration that differs from the registered one.
        note: description of a row whose name is not self-explanatory.
        mode: "eager", "optimized", "compile", "onnx" or "runtime".
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16".
        threads: threads of torch or of ONNX Runtime.
        batch: batch size; 0 in an absent row, as are height and width.
        height: image height in pixels.
        width: image width in pixels.
        status: "ok", "out_of_memory", "failed", or "absent" for rows that were never run.
        error: the reason, if the status is not "ok".
        forward: forward pass without gradients.
        train_step: forward, loss, backward and optimizer step; `None` if not measured.
        peak_memory_mib: peak memory of a forward pass, including the weights; `None` if not measured.
        train_memory_mib: peak memory of a training step, including weights and optimizer state.
        parameters: number of parameters of the training form.
        macs: multiply-adds of one image in the eager model: convolutions, matrix products and scans.
        macs_scan: multiply-adds of the scans alone.
        gflops_per_s: 10^9 operations per second at the median; two operations per multiply-add.
        matmul_share: `gflops_per_s` divided by the rate of the matrix product in the same group.
        onnx_file_bytes: size of the exported file, in the modes "onnx" and "runtime".
        published: the authors' figures.
    """

    model: str
    source: Source
    variant: str | None = None
    note: str | None = None
    mode: Mode
    device: str
    dtype: str
    threads: int
    batch: int
    height: int
    width: int
    status: Status
    error: str | None = None
    forward: Timing | None = None
    train_step: Timing | None = None
    peak_memory_mib: float | None = None
    train_memory_mib: float | None = None
    parameters: int | None = None
    macs: int | None = None
    macs_scan: int | None = None
    gflops_per_s: float | None = None
    matmul_share: float | None = None
    onnx_file_bytes: int | None = None
    published: PublishedFigures | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Identity of the row in a run: the model and the conditions."""
        conditions = (self.mode, self.device, self.dtype, self.threads, self.batch, self.height, self.width)
        return (self.model, self.source, self.variant, *conditions)


@dataclass(kw_only=True)
class BenchResult:
    """A finished or interrupted run.

    Attributes:
        command: the command line that repeats the run.
        preset: name of the preset, if any.
        settings: the settings; a run is resumed only with the same ones.
        system: see `lightspine.benchmark.describe_system`.
        matmul_gflops: highest measured rate of a matrix product in any group, in 10^9 operations per second,
            by dtype.
        rows: in the order of the table.
    """

    command: list[str]
    preset: str | None
    settings: dict[str, Any]
    system: dict[str, Any]
    matmul_gflops: dict[str, float]
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"format": FORMAT} | asdict(self)


def save_results(result: BenchResult, folder: Path) -> None:
    """Write `results.json` and `results.csv` into a folder, each atomically.

    Raises:
        LightspineError: the files cannot be written.
    """
    atomic_write_text(folder / RESULTS_NAME, json.dumps(result.as_dict(), indent=1, allow_nan=False) + "\n")
    atomic_write_text(folder / TABLE_NAME, _rows_to_csv(result.rows))


def load_results(path: str | Path) -> BenchResult:
    """Read and validate a result file, or the `results.json` of a folder.

    Raises:
        LightspineError: the file is missing, is not a result of `lightspine bench`, or has an invalid field.
    """
    path = Path(path)
    path = path / RESULTS_NAME if path.is_dir() else path
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LightspineError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise LightspineError(f"expected a result of `lightspine bench`, {path} is not JSON") from error
    if not isinstance(content, dict) or "format" not in content:
        raise LightspineError(f"expected a result of `lightspine bench`, {path} has no field `format`")
    if content["format"] != FORMAT:
        raise LightspineError(f"expected a result of format {FORMAT}, {path} has {content['format']!r}")
    try:
        return _parse_object(BenchResult, {name: content[name] for name in content if name != "format"}, "")
    except _FieldError as error:
        raise LightspineError(f"invalid result file {path}: {error}") from None


class _FieldError(Exception):
    pass


def _parse_object(kind: type, content: Any, where: str) -> Any:
    """Build a dataclass from JSON values and check every type."""
    if not isinstance(content, dict):
        raise _FieldError(f"{where or 'the file'} must be an object")
    prefix = f"{where}." if where else ""
    hints, known = get_type_hints(kind), {entry.name: entry for entry in fields(kind)}
    if unknown := [name for name in content if name not in known]:
        raise _FieldError(f"{prefix}{unknown[0]} is not known")
    for name, entry in known.items():
        if name not in content and entry.default is MISSING and entry.default_factory is MISSING:
            raise _FieldError(f"{prefix}{name} is missing")
    return kind(**{name: _parse_value(hints[name], content[name], f"{prefix}{name}") for name in content})


def _parse_value(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if isinstance(hint, UnionType):
        if value is None:
            return None
        [hint] = [option for option in get_args(hint) if option is not NoneType]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise _FieldError(f"{where} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is list:
        items = _check_type(list, value, where)
        return [_parse_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items)]
    if origin is dict:
        entries = _check_type(dict, value, where)
        return {key: _parse_value(arguments[1], item, f"{where}.{key}") for key, item in entries.items()}
    if hint in (Timing, PublishedFigures, Row):
        return _parse_object(hint, value, where)
    checked = _check_type((int, float) if hint is float else hint, value, where)
    # The texts of a file from others end in tables, charts and pages.
    return printable(checked) if isinstance(checked, str) else checked


def _check_type(kind: Any, value: Any, where: str) -> Any:
    # A bool is an int in Python but not in JSON.
    if not isinstance(value, kind) or isinstance(value, bool):
        name = "number" if isinstance(kind, tuple) else kind.__name__
        raise _FieldError(f"{where} must be of type {name}, got {value!r}")
    return value


def _rows_to_csv(rows: list[Row]) -> str:
    flat = [_flatten(asdict(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


_NESTED = {"forward": Timing, "train_step": Timing, "published": PublishedFigures}


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in _NESTED:
            flat |= {f"{name}_{entry.name}": (value or {}).get(entry.name) for entry in fields(_NESTED[name])}
        else:
            flat[name] = value
    return flat
