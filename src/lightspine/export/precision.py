"""Fewer bits: half precision, and 8-bit integers by ONNX Runtime's quantisation."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.onnx import SCAN_FLOATS, SCAN_FUNCTIONS
from lightspine.utils.image_files import list_image_files, open_image

CALIBRATION_IMAGES = 100
"""At most so many images of a folder are looked at, spread evenly over it."""


def to_half(model: Any) -> Any:
    """Return an ONNX model in float16, but for its inputs, its outputs and its scans.

    A scan multiplies hundreds of decays: like its steps it stays in float32.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = _with_own_inputs(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    # The converter puts casts around a scan only where it is told that a computed value is a float.
    for node in model.graph.node:
        if node.op_type in SCAN_FUNCTIONS:
            for name in {*node.input[:SCAN_FLOATS], *node.output} - weights:
                model.graph.value_info.append(
                    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                )
    with _quiet():
        # Weights that float16 has no number for become its least one; what that costs, the comparison tells.
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *SCAN_FUNCTIONS],
        )
    del half.graph.value_info[:]
    return half


def _with_own_inputs(model: Any) -> Any:
    """Let no two scans read the same computed value: the converter would name its two casts alike."""
    import onnx

    weights = {tensor.name for tensor in model.graph.initializer}
    nodes, read = [], set(weights)
    for node in model.graph.node:
        if node.op_type in SCAN_FUNCTIONS:
            for place, name in enumerate(node.input[:SCAN_FLOATS]):
                if name in read and name not in weights:
                    own = f"{name}_for_{node.output[0]}_{place}"
                    nodes.append(onnx.helper.make_node("Identity", [name], [own], name=own))
                    node.input[place] = own
                read.add(name)
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def quantise(model: Any, images: Sequence[Path] | None, preparation: dict[str, Any], pixels: bool) -> Any:
    """Return an ONNX model with 8-bit weights.

    Args:
        model: in float32.
        images: files on which the range of each activation is measured: convolutions and matrix products are
            then done in 8 bit. Without them matrix products by weights are, with the ranges of their other
            factor found on the fly.
        preparation: see `lightspine.export.metadata.Description.preprocessing`.
        pixels: whether the model takes 8-bit pixels.

    Raises:
        LightspineError: an image cannot be read.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        if images is None:
            quantize_dynamic(
                before,
                after,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        else:
            reader = _Reader(images, model.graph.input[0].name, preparation, pixels)
            quantize_static(
                before,
                after,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        return onnx.load(after)


class _Reader:
    """Gives ONNX Runtime's calibration the images one by one."""

    def __init__(self, images: Sequence[Path], name: str, preparation: dict[str, Any], pixels: bool):
        self.images = iter(images)
        self.name = name
        self.read = _image_reader(preparation, pixels)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        path = next(self.images, None)
        return None if path is None else {self.name: self.read(path)[None]}


def prepared_batches(images: Sequence[Path], preparation: dict[str, Any], pixels: bool) -> list[Tensor]:
    """Return the first images as batches of one and of up to three; for the arguments see `quantise`."""
    read = _image_reader(preparation, pixels)
    arrays = [read(path) for path in images[:3]]
    return [torch.from_numpy(np.stack(some)) for some in (arrays[:1], arrays)]


def _image_reader(preparation: dict[str, Any], pixels: bool) -> Callable[[Path], NDArray[Any]]:
    """Return a function that reads an image file as float32 (3, H, W), or as uint8 (H, W, 3)."""
    # Imported here because `import lightspine` loads this module.
    from lightspine.data.transforms import Preprocessing, create_eval_transform

    transform = create_eval_transform(Preprocessing.from_config(preparation), normalize=not pixels)

    def read(path: Path) -> NDArray[Any]:
        image = transform(open_image(path))
        return np.ascontiguousarray(image.permute(1, 2, 0) if pixels else image)

    return read


def list_calibration_images(folder: Path) -> list[Path]:
    """Return up to `CALIBRATION_IMAGES` files of a folder, at any depth.

    Raises:
        UsageError: the folder does not exist or holds no image.
    """
    if not folder.is_dir():
        raise UsageError(f"expected a folder of images to calibrate with, but {folder} is none")
    found = list_image_files(folder)
    if not found:
        raise UsageError(f"expected images to calibrate with, but the folder {folder} holds none")
    return found[:: -(-len(found) // CALIBRATION_IMAGES)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the converters advise to the debug level."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
