"""Checkpoint files: safe reading of any known format, whoever wrote it."""

import argparse
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.models.pickle_check import check_pickled_file
from lightspine.utils.files import is_file_name, parse_json

Weights = Literal["auto", "model", "ema"]
"""Weights to load: "model" as trained, "ema" for their moving average, "auto" for the published ones."""

PLAIN_ENTRIES = ("model", "state_dict", "model_state_dict", "net", "params")
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
# Attributes in which DDP, torch.compile and training code keep a model, the one to load first.
_WRAPPERS = ("module", "_orig_mod", "model", "net", "student", "backbone", "encoder", "ema_model", "teacher")
_OUTER_WRAPPERS = ("module", "_orig_mod", "model")
# Wrappers of single layers.
LAYER_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_EXPORTED_SUFFIXES = (".onnx", ".pt2", ".mlpackage")

NETWORK_KEY = "lightspine.network"
"""Metadata key of a detector's or segmenter's file, which holds a backbone without classifier and a head."""

VERSION_KEY = "lightspine.version"
"""Metadata key of every file that lightspine writes."""

CKPT_METADATA = "lightspine_metadata"
"""Entry of a training checkpoint (`.ckpt`) with the metadata that a safetensors file has in its header."""

WEIGHTS_KEY = "lightspine.weights"
"""Metadata key of a file with raw and averaged weights: those that "auto" selects, "model" or "ema"."""

OPENMMLAB_CLASSES_KEY = "openmmlab.classes"
"""Metadata key of the class names in an OpenMMLab checkpoint, a JSON list; OpenMMLab saves them in `meta`."""

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
    """Convert OrderedDicts to dicts recursively, because a pickle may set attributes of an OrderedDict.

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
            return {LAYER_WRAPPERS.sub("", key): value for key, value in tensors.items()}
        tensors = {key.removeprefix(f"{found}."): tensors[key] for key in below[found]}
