"""Model metadata of checkpoint files: architecture, constructor arguments, class names and preprocessing.

The metadata are enough to rebuild the model. They are validated first, because a file may come from anyone.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import Checkpoint
from lightspine.utils.files import is_text, parse_json

RUN_KEY = "lightspine.run"
"""Metadata key of the training run, as JSON; see `ModelMetadata.run`."""

CROP_MODES = ("center", "squash", "border")
"""Values of `crop_mode`, timm's names."""

PREPROCESSING_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Interpolation modes of the resize in the preprocessing, by the names of Pillow's resampling filters."""


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
    """Return whether values are a mean or std of image channels: one number, or one per channel."""
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
"""Constructor arguments that refer to other files or URLs, which a checkpoint may not store.

`pretrained` is not among them: it is ignored, because the weights are in the file.
"""

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
    """Limit the number of modules that the construction of a model may create.

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
