"""Checkpoint files: safe reading of any known format, and writing of lightspine's own.

lightspine writes safetensors files whose metadata name the model, its constructor arguments, its classes and
its image preprocessing, so that the file alone is enough to rebuild the model. The checkpoints of a training
run (`.ckpt`) and exported files have the same metadata.
"""

import argparse
import json
import pickle
import re
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from lightspine._version import __version__
from lightspine.errors import LightspineError, UsageError
from lightspine.models.pickle_check import check_pickled_file
from lightspine.utils.files import atomic_write, is_file_name, is_text, parse_json

Weights = Literal["auto", "model", "ema"]
"""Weights to load: "model" as trained, "ema" for their moving average, "auto" for the published ones."""

PLAIN_ENTRIES = ("model", "state_dict", "model_state_dict", "net", "params")
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
# Attributes in which DDP, torch.compile and training code keep a model, the one to load first.
_WRAPPERS = ("module", "_orig_mod", "model", "net", "student", "backbone", "encoder", "ema_model", "teacher")
_OUTER_WRAPPERS = ("module", "_orig_mod", "model")
# Wrappers of single layers.
_LAYER_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_EXPORTED_SUFFIXES = (".onnx", ".pt2", ".mlpackage")

NETWORK_KEY = "lightspine.network"
"""Metadata key of a detector's or segmenter's file, which holds a backbone without classifier and a head."""

VERSION_KEY = "lightspine.version"

CKPT_METADATA = "lightspine_metadata"
"""Entry of a training checkpoint (`.ckpt`) with the metadata that a safetensors file has in its header."""

WEIGHTS_KEY = "lightspine.weights"
"""Metadata key of a file with raw and averaged weights: those that "auto" selects, "model" or "ema"."""

RUN_KEY = "lightspine.run"
"""Metadata key of the training run, as JSON; see `ModelMetadata.run`."""

OPENMMLAB_CLASSES_KEY = "openmmlab.classes"
"""Metadata key of the class names in an OpenMMLab checkpoint, a JSON list; OpenMMLab saves them in `meta`."""

CROP_MODES = ("center", "squash", "border")
"""Values of `crop_mode`, timm's names."""

PREPROCESSING_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Interpolation modes of the resize in the preprocessing, by the names of Pillow's resampling filters."""

# Bounds that no checkpoint reaches, so that a small file cannot keep the process busy for minutes.
_MOST_TENSORS = 20_000
_LONGEST_NAME = 500
_LONGEST_METADATA = 2**24

_OPENMMLAB_HEADS = ("rpn_head.", "roi_head.", "bbox_head.", "decode_head.")


class Checkpoint:
    """An opened checkpoint file, or a state dict in memory.

    The tensors of a safetensors file are read at the first use of `entries`; its metadata are there at once.
    Functions that take a path to a checkpoint also take this object, so that a file is opened only once.

    Attributes:
        path: the file, `None` for a state dict.
        metadata: string metadata of a file that lightspine wrote; empty for others.
        left_out: by entry, the names of tensors beside the model, such as the buffers of a loss.
    """

    def __init__(
        self,
        path: Path | None,
        content: dict[str, dict[str, Tensor]] | safe_open,
        metadata: dict[str, str] | None = None,
    ):
        self.path = path
        self.metadata = metadata or {}
        if sum(map(len, self.metadata.values())) > _LONGEST_METADATA:
            raise LightspineError(
                f"{self.label} is refused: its metadata have more than {_LONGEST_METADATA:,} characters"
            )
        self.left_out: dict[str, list[str]] = {}
        self._content = content

    @cached_property
    def entries(self) -> dict[str, dict[str, Tensor]]:
        """State dict by entry name, without wrapper prefixes; a bare state dict is the single entry ""."""
        content = self._content
        if isinstance(content, dict):
            return {name: self._unwrap(name, tensors) for name, tensors in content.items()}
        try:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise LightspineError(f"{self.path} is not a complete safetensors file: {error}") from error
        self._content = {}  # releases the file
        return {"": self._unwrap("", tensors)}

    def _unwrap(self, entry: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Remove the prefixes of wrappers from the names of an entry."""
        longest = max(map(len, tensors), default=0)
        if len(tensors) > _MOST_TENSORS or longest > _LONGEST_NAME:
            raise LightspineError(
                f"{self.label} is refused: it holds {len(tensors):,} tensors with names of up to {longest:,} "
                f"characters, expected up to {_MOST_TENSORS:,} with names of up to {_LONGEST_NAME}"
            )
        unwrapped = _strip_prefixes(tensors, _OUTER_WRAPPERS)
        # The backbone of a detector or segmenter is one of its own parts.
        if NETWORK_KEY not in self.metadata and not self._has_openmmlab_names(unwrapped):
            unwrapped = _strip_prefixes(tensors, _WRAPPERS)
        kept = {id(tensor) for tensor in unwrapped.values()}
        self.left_out[entry] = [name for name, tensor in tensors.items() if id(tensor) not in kept]
        return unwrapped

    @property
    def label(self) -> str:
        """File name for messages, "the state dict" without a file."""
        return str(self.path) if self.path else "the state dict"

    @property
    def is_dense(self) -> bool:
        """Whether the file holds a detector or segmenter instead of a classifier or backbone."""
        return NETWORK_KEY in self.metadata or self.is_openmmlab

    @cached_property
    def is_openmmlab(self) -> bool:
        """Whether the file holds a detector of mmdetection or a segmenter of mmsegmentation."""
        return any(self._has_openmmlab_names(tensors) for tensors in self.entries.values())

    def _has_openmmlab_names(self, tensors: dict[str, Tensor]) -> bool:
        return (
            VERSION_KEY not in self.metadata
            and any(key.startswith("backbone.") for key in tensors)
            and any(key.startswith(_OPENMMLAB_HEADS) for key in tensors)
        )

    def select(self, weights: Weights, preferred: str = "model") -> str:
        """Return the name of the entry to use.

        Args:
            weights: "model", "ema" or "auto".
            preferred: meaning of "auto" for a file that has both and does not store it, "model" or "ema".

        Raises:
            UsageError: the file has no such entry.
        """
        if weights not in ("auto", "model", "ema"):
            raise UsageError(f"weights: expected 'auto', 'model' or 'ema', received {weights!r}")
        plain = [name for name in self.entries if name not in EMA_ENTRIES]
        averaged = [name for name in self.entries if name in EMA_ENTRIES]
        chosen = self.metadata.get(WEIGHTS_KEY, preferred) if weights == "auto" else weights
        candidates = averaged if chosen == "ema" else plain
        if not candidates and weights == "auto":
            candidates = plain or averaged
        if not candidates:
            found = ", ".join(repr(name) for name in self.entries)
            raise UsageError(f"{self.label} has no {weights!r} weights: it holds {found}")
        return candidates[0]


CheckpointSource: TypeAlias = str | Path | dict[str, Any] | Checkpoint
"""A checkpoint file, a state dict (bare or nested as in a file), or an opened checkpoint."""


def read_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open a checkpoint file (.pth, .ckpt, .safetensors) or wrap a state dict.

    Files are read with `weights_only=True`. Besides tensors and plain containers only `argparse.Namespace`
    and a stand-in for yacs' `CfgNode` are unpickled, which some official files contain. The NumPy arrays and
    training history in the files of mmengine are skipped.

    Args:
        source: path, name of published weights such as `vmamba_tiny.in1k`, which are downloaded at the first
            use, state dict, or an opened checkpoint, which is returned as it is.

    Raises:
        UsageError: the file does not exist, or is an exported `.onnx` or `.pt2` file.
        LightspineError: the file is empty, truncated, of another format, or would execute code.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, dict):
        return Checkpoint(None, _find_entries(source, "the state dict"))
    path = Path(source)
    if path.suffix.lower() in _EXPORTED_SUFFIXES:
        raise UsageError(
            f"expected a checkpoint, but {path} is an exported file: pass the checkpoint that it was "
            "exported from"
        )
    if not path.is_file():
        from lightspine.models.loading import fetch_published, is_published

        if not is_published(str(source)):
            raise UsageError(
                f"no checkpoint file {path}: expected a .pth, .ckpt or .safetensors file, or the name of "
                "published weights (`lightspine weights --all`)"
            )
        path = fetch_published(str(source)).path
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise LightspineError(f"{path} is empty: expected a checkpoint")
    # A safetensors file begins with the length of its JSON header in 8 bytes.
    if head[8:9] == b"{":
        try:
            opened = safe_open(str(path), framework="pt")
            return Checkpoint(path, opened, dict(opened.metadata() or {}))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise LightspineError(f"{path} is not a complete safetensors file: {error}") from error
    if path.name.endswith(".index.json"):
        return Checkpoint(path, {"": _read_shards(path)})
    content = load_pickled(path)
    if not isinstance(content, dict):
        raise LightspineError(f"{path} holds a {type(content).__name__}: expected a dict of tensors")
    entries = _find_entries(content, str(path))
    _check_sizes(path, entries)
    return Checkpoint(path, entries, find_metadata(content))


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that the index of a sharded checkpoint lists, which are beside it."""
    try:
        names = set(parse_json(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise LightspineError(f"{index} is not the index of a sharded checkpoint") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(map(str, names)):
        if not is_file_name(name) or name.endswith(".json"):
            raise LightspineError(f"{index} lists {name[:80]!r}: expected files in its own folder")
        for entry in read_checkpoint(index.with_name(name)).entries.values():
            tensors |= entry
    return tensors


class _CfgNode:
    """Stand-in for `yacs.config.CfgNode`, a dict of settings in some official files.

    torch's restricted unpickler fills only plain and ordered dicts, so an instance is an ordered dict.
    """

    def __new__(cls) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


class _Skipped:
    """Stand-in for objects in the training state of mmengine's files: it keeps nothing and calls nothing."""

    def __new__(cls, *args: Any) -> Self:  # noqa: ARG004 (what the pickle passes)
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# mmengine saves the history of the losses as objects that refer to their own methods and to NumPy arrays.
_SKIPPED_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Int64DType",
    "_codecs.encode",
)
_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_CfgNode, "yacs.config.CfgNode"),
    *((_Skipped, name) for name in _SKIPPED_GLOBALS),
]


def _check_no_program(path: Path) -> None:
    """Check that a file is not a compiled or exported program, which is a zip archive as a checkpoint is."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    # zipfile raises all of these for a damaged archive.
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise LightspineError(f"{path} is not a PyTorch checkpoint, or it is damaged") from error
    if "constants.pkl" in names:
        kind = "a TorchScript program"
    elif "archive_format" in names:
        kind = "an exported program (.pt2)"
    else:
        return
    raise LightspineError(f"{path} is {kind}: expected weights, the state dict of the model")


def load_pickled(path: Path, *, mmap: bool = False) -> Any:
    """Load a file of `torch.save` to the CPU without running code: the only place that unpickles files.

    Args:
        path: the file.
        mmap: read the tensors when they are used.

    Returns:
        The content; dictionaries are plain ones.

    Raises:
        LightspineError: the file is no complete checkpoint, would execute code, or holds values that no
            checkpoint has.
    """
    _check_no_program(path)
    check_pickled_file(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS), warnings.catch_warnings():
            # The user cannot change the pickle protocol; unreadable files raise below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Only archives can be mapped.
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path)
            )
            return _as_plain(loaded, {})
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        if refused is None or "Unsupported operand" in str(error):
            raise LightspineError(f"{path} is not a PyTorch checkpoint, or it is damaged") from error
        raise LightspineError(
            f"{path} is rejected: it contains {refused.group(1)}, which may run code; no code was run. "
            "If you trust the file, save its bare state dict as safetensors"
        ) from error
    except (RuntimeError, OSError) as error:
        raise LightspineError(
            f"{path} is not a complete PyTorch checkpoint: {str(error).splitlines()[0]}"
        ) from error
    # The unpickler raises these for data that is not a pickle.
    except (
        EOFError,
        ValueError,
        LookupError,
        AssertionError,
        AttributeError,
        TypeError,
        ArithmeticError,
        MemoryError,
        struct.error,
        # torch.load reads files named .safetensors as such.
        SafetensorError,
    ) as error:
        raise LightspineError(f"{path} is not a PyTorch checkpoint, or it is damaged") from error


def _as_plain(value: Any, done: dict[int, Any]) -> Any:
    """Convert ordered dictionaries to plain ones, recursively: a file may set their attributes.

    Args:
        value: the value, nested no deeper than `check_pickled_file` lets pass.
        done: results by the identity of the value, which may refer to itself.
    """
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        plain: dict[Any, Any] = {}
        done[id(value)] = plain
        plain.update((key, _as_plain(item, done)) for key, item in dict.items(value))
        return plain
    if type(value) is list:
        done[id(value)] = value
        value[:] = [_as_plain(item, done) for item in value]
    elif isinstance(value, Tensor):
        # Not the method of the value: a file may set attributes of a tensor.
        return Tensor.detach(value)
    return value


def _check_sizes(path: Path, entries: dict[str, dict[str, Tensor]]) -> None:
    """Check that tensors stand for numbers that the file has: a view may repeat one number any times."""
    for name, tensor in ((name, tensor) for entry in entries.values() for name, tensor in entry.items()):
        if tensor.device.type != "cpu":
            raise LightspineError(f"{path} is refused: its tensor {name} has no values")
    claimed = sum(
        tensor.numel() * tensor.element_size() for entry in entries.values() for tensor in entry.values()
    )
    size = path.stat().st_size
    # Tensors may be saved twice, such as tied weights.
    if claimed > 4 * size + 2**20:
        raise LightspineError(
            f"{path} is refused: its tensors claim {claimed:,} bytes, the file has {size:,}"
        )


def find_metadata(content: dict[str, Any]) -> dict[str, str]:
    """Return the metadata in the content of a pickled checkpoint, {} if it has none."""
    found = content.get(CKPT_METADATA)
    if not isinstance(found, dict):
        names = _find_openmmlab_classes(content.get("meta"))
        return {OPENMMLAB_CLASSES_KEY: json.dumps(names)} if names else {}
    return {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, str)}


def _find_openmmlab_classes(meta: Any) -> list[str]:
    """Return the class names in an OpenMMLab file: `CLASSES` of its `meta`, in 3.x `dataset_meta`."""
    if not isinstance(meta, dict):
        return []
    dataset = meta.get("dataset_meta")
    places = (meta, dataset if isinstance(dataset, dict) else {})
    for names in (place.get(key) for place in places for key in ("CLASSES", "classes")):
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return list(names)
    return []


def _find_entries(content: dict[str, Any], label: str) -> dict[str, dict[str, Tensor]]:
    entries = {
        name: _tensors_only(content[name])
        for name in (*PLAIN_ENTRIES, *EMA_ENTRIES)
        if isinstance(content.get(name), dict) and _tensors_only(content[name])
    }
    if isinstance(content.get("current_model_state"), dict) and "state_dict" in entries:
        # Lightning's EMA callback saves the average as `state_dict` and the trained weights beside it.
        entries = {
            "state_dict": _tensors_only(content["current_model_state"]),
            "state_dict_ema": entries["state_dict"],
        }
    if not entries and _tensors_only(content):
        entries = {"": _tensors_only(content)}
    if not entries:
        names = ", ".join(repr(key) for key in list(content)[:6]) or "nothing"
        raise LightspineError(
            f"{label} holds no weights: expected one of {PLAIN_ENTRIES + EMA_ENTRIES}, found {names}"
        )
    return entries


def _tensors_only(content: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise LightspineError(
                f"expected dense tensors in a checkpoint, but {name} is sparse, quantized or nested"
            )
    return tensors


def _strip_prefixes(tensors: dict[str, Tensor], wrappers: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of the innermost wrapped model by their names in it.

    A model is wrapped if more tensors are below the wrapper than beside all wrappers. Those beside it, such
    as a loss's buffers or the number of averaged models, belong to the wrapper.
    """
    while True:
        below = {name: [key for key in tensors if key.startswith(f"{name}.")] for name in wrappers}
        beside = len(tensors) - sum(map(len, below.values()))
        found = next((name for name in wrappers if len(below[name]) > beside), None)
        if found is None:
            return {_LAYER_WRAPPERS.sub("", key): value for key, value in tensors.items()}
        tensors = {key.removeprefix(f"{found}."): tensors[key] for key in below[found]}


@dataclass
class ModelMetadata:
    """Description of a model in a lightspine file.

    Attributes:
        name: registered name.
        kwargs: arguments of `create_model`.
        class_names: one name per class, or `None`.
        preprocessing: `input_size` (channels, height, width), `interpolation`, `mean`, `std`, `crop_pct`,
            `crop_mode`.
        metadata: further strings, such as the score.
        run: the training run: `recipe` (name), `config` (its settings), `seed` and `data` (fields of a
            `lightspine.data.split_record.SplitRecord`); empty if unknown.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def read_model_metadata(checkpoint: Checkpoint) -> ModelMetadata | None:
    """Return the description of a classifier or backbone, or `None` for a file that lightspine did not write.

    Raises:
        UsageError: the file holds a detector or segmenter.
        LightspineError: the metadata are damaged.
    """
    strings = dict(checkpoint.metadata)
    if checkpoint.is_dense:
        raise UsageError(f"{checkpoint.label} holds a detector or segmenter, expected a classifier's weights")
    name = strings.pop("lightspine.model", None)
    if name is None:
        return None
    try:
        kwargs = parse_json(strings.pop("lightspine.kwargs", "{}"))
        preprocessing = parse_json(strings.pop("lightspine.preprocessing", "{}"))
        class_names = parse_json(strings.pop("lightspine.class_names", "null"))
        run = parse_json(strings.pop(RUN_KEY, "{}"))
    except ValueError as error:
        raise LightspineError(f"{checkpoint.label} has damaged metadata: {error}") from error
    check_description(
        checkpoint.label, name=name, class_names=class_names, preprocessing=preprocessing, run=run
    )
    return ModelMetadata(name, kwargs, class_names, preprocessing, strings, run)


# Largest height, width and other number in the image settings of a file; a flag may ask for more.
_LARGEST_SIDE = 4096
_LARGEST_SETTING = 8192


def check_description(
    label: str,
    *,
    name: Any,
    class_names: Any,
    preprocessing: Any,
    run: Any,
    settings: Any = None,
) -> None:
    """Check the types and ranges of what a file says beside the arguments of its model.

    Raises:
        LightspineError: a value has another type, or is out of the range that a model can have.
    """
    check_architecture(label, name)
    if class_names is not None and not (
        isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    ):
        raise LightspineError(f"{label} has damaged metadata: expected a list of class names")
    if any(not is_text(name) for name in class_names or ()):
        raise LightspineError(f"{label} has damaged metadata: a class name is not valid Unicode")
    for name, value in (("preprocessing", preprocessing), ("run", run), ("settings", settings or {})):
        if not isinstance(value, dict):
            raise LightspineError(
                f"{label} has damaged metadata: expected an object as its {name}, "
                f"received a {type(value).__name__}"
            )
    _check_preprocessing(label, preprocessing)
    _check_run(label, run)
    for name, value in flatten_arguments(settings or {}):
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_SETTING:
            raise LightspineError(f"{label} is refused: its setting {name} is beyond {_LARGEST_SETTING}")


def check_architecture(label: str, name: Any) -> None:
    """Check the architecture name in a file: it may not stand for a repository or folder.

    Raises:
        LightspineError: it is not.
    """
    if not isinstance(name, str):
        raise LightspineError(f"{label} has damaged metadata: expected the name of its model, got {name!r}")
    if ":" in name:
        raise LightspineError(f"{label} is refused: its architecture {name[:80]!r} stands for another model")


def _check_preprocessing(label: str, values: dict[str, Any]) -> None:
    size = values.get("input_size")
    checks = {
        "input_size": lambda found: (
            len(found) == 3 and all(isinstance(size, int) and 1 <= size <= _LARGEST_SIDE for size in found)
        ),
        "mean": lambda found: _are_numbers(found, size, -1e3, 1e3),
        "std": lambda found: _are_numbers(found, size, 1e-6, 1e3),
        # The image is resized to the size divided by this share before it is cropped.
        "crop_pct": lambda found: (
            0.05 <= found <= 10 and max((size or [1])[-2:]) / found <= 2 * _LARGEST_SIDE
        ),
        "interpolation": lambda found: found in INTERPOLATIONS,
        "crop_mode": lambda found: found in CROP_MODES,
    }
    for name, check in checks.items():
        value = values.get(name)
        try:
            valid = value is None or check(value)
        except (TypeError, ValueError, OverflowError, LookupError):
            valid = False
        if not valid:
            raise LightspineError(
                f"{label} has damaged metadata: its preprocessing has the {name} {str(value)[:80]!r}"
            )


def _are_numbers(values: Any, size: list[int] | None, low: float, high: float) -> bool:
    """Return whether these are statistics of the channels of an image, one for all or one for each."""
    channels = size[0] if size else 3
    return (
        isinstance(values, list | tuple)
        and len(values) in (1, channels)
        and all(isinstance(value, int | float) and low <= value <= high for value in values)
    )


def _check_run(label: str, run: dict[str, Any]) -> None:
    data = {} if run.get("data") is None else run["data"]
    fraction, seed = (data.get("val_fraction"), data.get("seed")) if isinstance(data, dict) else ("", "")
    if (
        not isinstance(run.get("recipe"), str | None)
        or not isinstance(fraction, int | float | None)
        or not isinstance(seed, int | None)
        # A split that was drawn has both.
        or (fraction is None) != (seed is None)
        or not 0 <= (fraction or 0) <= 1
        or not abs(seed or 0) < 2**63
    ):
        raise LightspineError(f"{label} has damaged metadata: its training run has a wrong recipe or split")


FOREIGN_ARGUMENTS = (
    "checkpoint",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
)
"""Arguments that name other files or addresses. `pretrained` is ignored: the weights are in the file."""

# Numbers up to this one are believed, such as the sizes of images.
_BELIEVED = 4096


def check_arguments(
    checkpoint: Checkpoint, arguments: Any, build: Callable[[dict[str, Any]], nn.Module]
) -> dict[str, Any]:
    """Check the arguments of a model that a file stores, before the model is built.

    A file could name other files and addresses, or sizes that fill the memory; its tensors must confirm them.

    Args:
        checkpoint: the file.
        arguments: the arguments as read from it.
        build: builds the model from the arguments; called on the meta device, where tensors take no memory.

    Returns:
        The arguments, without `pretrained`.

    Raises:
        LightspineError: the arguments are no plain values, name other files, or do not fit the tensors.
    """
    if not isinstance(arguments, dict):
        raise LightspineError(f"{checkpoint.label} has damaged metadata: its model arguments are no object")
    arguments = {name: value for name, value in arguments.items() if name != "pretrained"}
    tensors = [tensor for entry in checkpoint.entries.values() for tensor in entry.values()]
    largest = max((size for tensor in tensors for size in tensor.shape), default=0)
    for name, value in flatten_arguments(arguments):
        if name in FOREIGN_ARGUMENTS:
            raise LightspineError(
                f"{checkpoint.label} is refused: its model argument {name} names another file"
            )
        number = value if isinstance(value, int | float) else 0
        # A comparison with NaN is false.
        if not abs(number) <= max(_BELIEVED, largest) or ("depth" in name and number > len(tensors)):
            raise LightspineError(
                f"{checkpoint.label} is refused: its model argument {name} is {value}, which its "
                f"{len(tensors)} tensors of sizes up to {largest} do not confirm"
            )
    try:
        # A module may have no tensors, such as an activation, or many small ones.
        with torch.device("meta"), limit_modules(checkpoint.label, 10_000 + 20 * len(tensors)):
            needed = sum(tensor.numel() for tensor in build(arguments).state_dict().values())
    except BUILD_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LightspineError(f"{checkpoint.label} stores wrong model arguments: {reason}") from error
    received = sum(tensor.numel() for tensor in tensors)
    # Raw and averaged weights may both be there; a position table may be resized.
    if needed > 4 * received + 2**20:
        raise LightspineError(
            f"{checkpoint.label} is refused: its model arguments describe {needed:,} numbers, its "
            f"tensors have {received:,}"
        )
    return arguments


BUILD_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    RuntimeError,
)
"""Exceptions of constructors of models with arguments of wrong types or values."""


@contextmanager
def limit_modules(label: str, most: int) -> Iterator[None]:
    """Stop the construction of a model at a number of modules.

    An argument of a few bytes can describe millions of layers, by many names: depths, layers, blocks.

    Args:
        label: name of the file, for the message.
        most: number of modules that may be created by this thread inside the block.

    Raises:
        LightspineError: more are created.
    """
    count, thread = 0, threading.get_ident()

    def register(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise LightspineError(
                f"{label} is refused: its model arguments describe more than {most:,} layers"
            )

    handle = register_module_module_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def flatten_arguments(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of arguments that a file stores, also those in nested lists and objects.

    A list yields the sum of its numbers too if it has depths.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), None
            yield from flatten_arguments(inner, str(key))
    elif isinstance(value, list | tuple):
        yield name, sum(item for item in value if isinstance(item, int) and "depth" in name)
        for inner in value:
            yield from flatten_arguments(inner, name)
    else:
        yield name, value


def default_preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return the image preprocessing of a model's published evaluation; see `ModelMetadata`."""
    cfg = getattr(model, "pretrained_cfg", {})
    return {key: cfg[key] for key in PREPROCESSING_KEYS if key in cfg}


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    run: dict[str, Any] | None = None,
) -> Path:
    """Save a model made by `lightspine.create_model` as a safetensors file that rebuilds it.

    Args:
        model: the model; its name and arguments are saved with its weights. `reset_classifier` may have
            changed its classes.
        path: file to write; an existing file is replaced atomically.
        class_names: one name per class.
        preprocessing: image preprocessing (see `ModelMetadata`); by default the published one.
        metadata: further strings, such as the score.
        run: see `ModelMetadata`.

    Returns:
        The path.

    Raises:
        UsageError: the file name does not end in .safetensors, `create_model` did not make the model, or its
            layers have been replaced since, as by `lightspine.optimize`.
        LightspineError: the file cannot be written.
    """
    described = model_metadata(model, class_names=class_names, preprocessing=preprocessing)
    described["lightspine.kwargs"] = json.dumps(_rebuilding_arguments(model))
    if run:
        described[RUN_KEY] = json.dumps(run)
    return write_safetensors(model, path, described | (metadata or {}))


def _rebuilding_arguments(model: Any) -> dict[str, Any]:
    """Return the arguments by which `create_model` rebuilds a model as it is now.

    Raises:
        UsageError: no arguments do, because other layers have been replaced than the classifier.
    """
    from lightspine.models.factory import create_model

    name, kwargs = model.init_args["name"], dict(model.init_args["kwargs"])
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        rebuilt: Any = create_model(name, **kwargs)
        changed = {
            key: value
            for key, value in _classifier_arguments(model).items()
            if value != _classifier_arguments(rebuilt).get(key)
        }
        if changed:
            kwargs |= changed
            rebuilt = create_model(name, **kwargs)
    expected = {key: tensor.shape for key, tensor in rebuilt.state_dict().items()}
    # A reader strips the names of compiled layers, too.
    received = {_LAYER_WRAPPERS.sub("", key): tensor.shape for key, tensor in model.state_dict().items()}
    if expected != received:
        differing = [key for key in expected | received if expected.get(key) != received.get(key)]
        raise UsageError(
            f"expected {name} with the tensors that lightspine.create_model gives it, but {len(differing)} "
            f"differ, such as {differing[0]}: save the model before lightspine.optimize, quantization or "
            "adapters change its layers"
        )
    return kwargs


def _classifier_arguments(model: Any) -> dict[str, Any]:
    """Return what `reset_classifier` may have changed, as arguments of the constructor."""
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    found = {"num_classes": getattr(model, "num_classes", None), "global_pool": pool}
    return {key: value for key, value in found.items() if isinstance(value, int | str)}


def model_metadata(
    model: nn.Module,
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return the metadata that rebuild a model made by `lightspine.create_model`; see `save_checkpoint`.

    Raises:
        UsageError: `create_model` did not make the model.
    """
    init_args = getattr(model, "init_args", None)
    if init_args is None:
        raise UsageError(
            "expected a model made by lightspine.create_model: the file stores the arguments that rebuild it"
        )
    strings = {
        "lightspine.model": init_args["name"],
        "lightspine.kwargs": json.dumps(init_args["kwargs"]),
        "lightspine.preprocessing": json.dumps(preprocessing or default_preprocessing(model)),
    }
    if class_names is not None:
        strings["lightspine.class_names"] = json.dumps(class_names)
    return strings


def write_safetensors(module: nn.Module, path: str | Path, metadata: dict[str, str]) -> Path:
    """Write the state dict of a module with string metadata, atomically.

    Raises:
        UsageError: the file name does not end in .safetensors.
        LightspineError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"expected a file name that ends in .safetensors, received {path.name!r}")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
    header = {"format": "pt", VERSION_KEY: __version__} | metadata
    # safetensors' own save_file creates files that only their owner may read.
    with atomic_write(path) as file:
        file.write(save(tensors, metadata=header))
    return path
