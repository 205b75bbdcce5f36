"""The result file of `lightspine bench`: what is in it, and how it is written and read.

One JSON object, the same whether a run is finished or was interrupted. A row is one model in one mode,
dtype, batch and size; it is there also when it could not be measured, and says why. `results.csv` beside it
holds the same rows flat, for a spreadsheet.
"""

import csv
import io
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightspine.errors import LightspineError
from lightspine.utils.files import atomic_write_text

FORMAT = 1
RESULTS_NAME, TABLE_NAME = "results.json", "results.csv"

Source = Literal["lightspine", "timm"]
Mode = Literal["eager", "optimized", "compile", "onnx"]
Status = Literal["ok", "out_of_memory", "failed", "absent"]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Time of one kind of pass.

    Attributes:
        median_ms: half of the timed calls were faster, in milliseconds.
        p90_ms: nine of ten were faster, in milliseconds.
        repeats: timed calls.
        images_per_s: batch over the median.
    """

    median_ms: float
    p90_ms: float
    repeats: int
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class PublishedFigures:
    """What authors print; measured by nobody here. `None` where they print nothing.

    Attributes:
        top1: ImageNet-1k accuracy in percent.
        throughput: images per second.
        throughput_device: what the throughput was measured on, and its batch.
        macs_g: multiply-adds in 10^9, which the papers call FLOPs.
        params_m: parameters in millions.
        source: where the figures are printed.
    """

    top1: float | None = None
    throughput: float | None = None
    throughput_device: str | None = None
    macs_g: float | None = None
    params_m: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one mode, dtype, batch and size.

    Attributes:
        model: registered name, or what a paper calls a model that is absent here.
        source: whose implementation.
        variant: which of several configurations of the model, such as the letter of a step.
        note: what the row is where its name does not say it all.
        mode: how it ran.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16".
        threads: of torch, or of ONNX Runtime.
        batch: images at a time; 0 in a row that is absent, as its height and width are.
        height: of the images, in pixels.
        width: of the images, in pixels.
        status: "absent" rows were never run; `error` says why.
        error: one sentence, where the status is not "ok".
        forward: a forward pass without gradients.
        train_step: forward, loss, backward and optimiser; `None` where not asked for or not possible.
        peak_memory_mib: of a forward pass, the weights included; `None` where it cannot be told.
        train_memory_mib: of a training step, the weights and the optimiser's state included.
        parameters: of the model as it is trained.
        macs: multiply-adds of one image by convolutions, matrix products and scans, in the eager model.
        macs_scan: those of the scans alone.
        gflops_per_s: two per multiply-add and image, over the median forward.
        matmul_share: that over the rate of matrix products in the same dtype that took turns with the row.
        published: what authors print about the model.
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
    forward: Pass | None = None
    train_step: Pass | None = None
    peak_memory_mib: float | None = None
    train_memory_mib: float | None = None
    parameters: int | None = None
    macs: int | None = None
    macs_scan: int | None = None
    gflops_per_s: float | None = None
    matmul_share: float | None = None
    published: PublishedFigures | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this row from every other of a run."""
        where = (self.mode, self.device, self.dtype, self.threads, self.batch, self.height, self.width)
        return (self.model, self.source, self.variant, *where)


@dataclass(kw_only=True)
class BenchResult:
    """A run, or as much of it as is done.

    Attributes:
        command: the arguments that repeat it.
        preset: name of the preset, if one was asked for.
        settings: how it was measured; a run is only resumed with the same.
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
        """Return plain values that JSON can hold."""
        return {"format": FORMAT} | asdict(self)


def save_results(result: BenchResult, folder: Path) -> None:
    """Write `results.json` and `results.csv` into a folder, each whole or not at all.

    Raises:
        LightspineError: they cannot be written.
    """
    atomic_write_text(folder / RESULTS_NAME, json.dumps(result.as_dict(), indent=1, allow_nan=False) + "\n")
    atomic_write_text(folder / TABLE_NAME, _as_csv(result.rows))


def load_results(path: str | Path) -> BenchResult:
    """Read a result file, or the one in a folder.

    Raises:
        LightspineError: there is no such file, it is no result of `lightspine bench`, or one of another
            version; the sentence names the field that is wrong.
    """
    path = Path(path)
    path = path / RESULTS_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LightspineError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise LightspineError(f"expected a result of `lightspine bench`, {path} is not JSON") from error
    if not isinstance(content, dict) or "format" not in content:
        raise LightspineError(f"expected a result of `lightspine bench`, {path} has no field `format`")
    if content["format"] != FORMAT:
        raise LightspineError(f"expected a result of format {FORMAT}, {path} has {content['format']!r}")
    try:
        return _read(BenchResult, {name: content[name] for name in content if name != "format"}, "")
    except _FieldError as error:
        raise LightspineError(f"the result file {path} is damaged: {error}") from None


class _FieldError(Exception):
    pass


def _read(kind: type, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise _FieldError(f"{where or 'the file'} must be an object")
    prefix = f"{where}." if where else ""
    hints, known = get_type_hints(kind), {entry.name: entry for entry in fields(kind)}
    if unknown := [name for name in content if name not in known]:
        raise _FieldError(f"{prefix}{unknown[0]} is not known")
    values = {}
    for name, entry in known.items():
        if name in content:
            values[name] = _value(hints[name], content[name], f"{prefix}{name}")
        elif entry.default is entry.default_factory:
            # Both say "missing" where the field has no default.
            raise _FieldError(f"{prefix}{name} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType]
        return None if value is None else _value(options[0], value, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise _FieldError(f"{where} must be one of {', '.join(get_args(hint))}, got {value!r}")
        return value
    if get_origin(hint) is list:
        return [
            _value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(_of(list, value, where))
        ]
    if get_origin(hint) is dict:
        item_hint = get_args(hint)[1]
        return {
            key: _value(item_hint, item, f"{where}.{key}") for key, item in _of(dict, value, where).items()
        }
    if hint is Any:
        return value
    if hint in (Pass, PublishedFigures, Row):
        return _read(hint, value, where)
    return _of((int, float) if hint is float else hint, value, where)


def _of(kind: Any, value: Any, where: str) -> Any:
    # A bool is an int to Python, but no number in a file.
    if not isinstance(value, kind) or isinstance(value, bool):
        names = ("number",) if isinstance(kind, tuple) else (kind.__name__,)
        raise _FieldError(f"{where} must be of type {names[0]}, got {value!r}")
    return value


def _as_csv(rows: list[Row]) -> str:
    flat = [_flatten(asdict(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


_PARTS = {"forward": Pass, "train_step": Pass, "published": PublishedFigures}


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in _PARTS:
            flat |= {f"{name}_{entry.name}": (value or {}).get(entry.name) for entry in fields(_PARTS[name])}
        else:
            flat[name] = value
    return flat
