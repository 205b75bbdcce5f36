"""Read a checkpoint file of any of the known formats without running code from it."""

import argparse
import json
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightspine.errors import LightspineError, UsageError

Weights = Literal["auto", "model", "ema"]

PLAIN_ENTRIES = ("model", "state_dict")
EMA_ENTRIES = ("model_ema", "state_dict_ema")
# DDP, torch.compile and Lightning put these before every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")


class _CfgNode:
    """Stands in for `yacs.config.CfgNode`, a dict with settings that some official files carry.

    torch's restricted unpickler fills plain and ordered dicts only, so making one gives an ordered dict.
    """

    def __new__(cls) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


_ALLOWED: list[Any] = [argparse.Namespace, (_CfgNode, "yacs.config.CfgNode")]


@dataclass
class CheckpointFile:
    """The tensors of a checkpoint file.

    Attributes:
        path: where they were read, `None` for tensors that were handed over.
        entries: entry name -> state dict, names without wrapper prefixes. A file that is a state dict itself
            has the single entry "".
        metadata: the string metadata of a safetensors file.
    """

    path: Path | None
    entries: dict[str, dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The file's name for messages."""
        return str(self.path) if self.path else "the state dict"

    def select(self, weights: Weights, preferred: str = "model") -> str:
        """Return the name of the entry to use.

        Args:
            weights: "model" or "ema", or "auto" for the one whose score is published.
            preferred: "model" or "ema", what "auto" means when the file has both.

        Raises:
            UsageError: the file has no such entry.
        """
        if weights not in ("auto", "model", "ema"):
            raise UsageError(f"weights: expected 'auto', 'model' or 'ema', received {weights!r}")
        plain = [name for name in self.entries if name not in EMA_ENTRIES]
        averaged = [name for name in self.entries if name in EMA_ENTRIES]
        wanted = averaged if (preferred if weights == "auto" else weights) == "ema" else plain
        if not wanted and weights == "auto":
            wanted = plain or averaged
        if not wanted:
            found = ", ".join(repr(name) for name in self.entries)
            raise UsageError(f"{self.label} has no {weights!r} weights: it holds {found}")
        return wanted[0]


def read_checkpoint(source: str | Path | dict[str, Any]) -> CheckpointFile:
    """Read a checkpoint file, or take a state dict (or the dict that a file would hold) as it is.

    Files are read with `weights_only=True`; besides tensors and plain containers only
    `argparse.Namespace` and a stand-in for yacs' `CfgNode` are made.

    Raises:
        UsageError: there is no such file.
        LightspineError: the file is empty, truncated, of another kind, or asks for code to run.
    """
    if isinstance(source, dict):
        return CheckpointFile(None, _find_entries(source, "the state dict"))
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"no checkpoint file {path}: expected a .pth, .ckpt or .safetensors file")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise LightspineError(f"{path} is empty: expected a checkpoint")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    content = _read_torch(path)
    if not isinstance(content, dict):
        raise LightspineError(f"{path} holds a {type(content).__name__}: expected a dict of tensors")
    return CheckpointFile(path, _find_entries(content, str(path)))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors; none of any other file.

    Raises:
        UsageError: there is no such file.
        LightspineError: the file is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint file {path}: expected a .pth, .ckpt or .safetensors file")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] != b"{":
        return {}
    try:
        with safe_open(str(path), framework="pt") as tensors:
            return dict(tensors.metadata() or {})
    except (SafetensorError, json.JSONDecodeError) as error:
        raise LightspineError(f"{path} is not a complete safetensors file: {error}") from error


def _read_safetensors(path: Path) -> CheckpointFile:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise LightspineError(f"{path} is not a complete safetensors file: {error}") from error
    return CheckpointFile(path, {"": _strip_prefixes(tensors)}, metadata)


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            # Of no use to whoever has the file: what the reader does not know, it refuses below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        if asked is None or "Unsupported operand" in str(error):
            raise LightspineError(f"{path} is not a PyTorch checkpoint, or it is damaged") from error
        raise LightspineError(
            f"{path} is refused: it asks for {asked.group(1)}, which may run code; nothing in it was run. "
            "Save the bare state dict as safetensors where you trust the file"
        ) from error
    except (RuntimeError, OSError) as error:
        raise LightspineError(
            f"{path} is not a complete PyTorch checkpoint: {str(error).splitlines()[0]}"
        ) from error
    # What the unpickler raises on bytes that are no pickle.
    except (
        EOFError,
        ValueError,
        LookupError,
        AssertionError,
        AttributeError,
        TypeError,
        struct.error,
    ) as error:
        raise LightspineError(f"{path} is not a PyTorch checkpoint, or it is damaged") from error


def _find_entries(content: dict[str, Any], label: str) -> dict[str, dict[str, Tensor]]:
    entries = {
        name: _strip_prefixes(content[name])
        for name in (*PLAIN_ENTRIES, *EMA_ENTRIES)
        if isinstance(content.get(name), dict) and _tensors(content[name])
    }
    if "current_model_state" in content and "state_dict" in entries:
        # Lightning's EMA callback saves the average as `state_dict` and the live weights beside it.
        entries = {
            "state_dict": _strip_prefixes(content["current_model_state"]),
            "state_dict_ema": entries["state_dict"],
        }
    if not entries and _tensors(content):
        entries = {"": _strip_prefixes(content)}
    if not entries:
        names = ", ".join(repr(key) for key in list(content)[:6]) or "nothing"
        raise LightspineError(
            f"{label} holds no weights: expected one of {PLAIN_ENTRIES + EMA_ENTRIES}, found {names}"
        )
    return entries


def _tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _strip_prefixes(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    tensors = _tensors(state_dict)
    for prefix in _WRAPPER_PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
