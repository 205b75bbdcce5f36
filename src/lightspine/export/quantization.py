"""Reduced precision of ONNX models: float16, and int8 by ONNX Runtime's quantization."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.export.onnx_graph import define_scans
from lightspine.export.verification import open_session
from lightspine.ops.onnx import SCAN_FLOATS, SCAN_FUNCTIONS
from lightspine.utils.image_files import list_image_files, open_image

if TYPE_CHECKING:
    from lightspine.heads.detection_transform import DetectionTransform

MAX_CALIBRATION_IMAGES = 100
"""Maximum number of calibration images; they are spread evenly over the folder."""


def to_half(model: Any, network: set[str] | None = None) -> Any:
    """Convert an ONNX model to float16, except for its inputs, outputs and scans.

    A scan multiplies hundreds of decay factors and needs float32.

    Args:
        model: an `onnx.ModelProto` whose scans are calls of functions.
        network: names of the operators to convert; default: all.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    if network is not None:
        _separate_network(model, network)
    model = _separate_scan_inputs(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    # The converter inserts casts around a scan only for values that are declared as float.
    for node in model.graph.node:
        if node.op_type in SCAN_FUNCTIONS:
            for name in {*node.input[:SCAN_FLOATS], *node.output} - weights:
                model.graph.value_info.append(
                    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                )
    kept = [] if network is None else [node.name for node in model.graph.node if node.name not in network]
    with _quiet_converters():
        # Weights below float16's range become its smallest number; the comparison with PyTorch covers it.
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *SCAN_FUNCTIONS],
            node_block_list=kept,
        )
    del half.graph.value_info[:]
    return half


def _separate_network(model: Any, network: set[str]) -> None:
    """Declare the float values between the operators to convert and the others, for the casts between them.

    Each of the others reads a value of its own, because the converter names casts after the value.

    Args:
        model: an `onnx.ModelProto`, modified in place.
        network: names of the operators to convert.
    """
    import onnx

    made: dict[bool, set[str]] = {True: set(), False: set()}
    used: dict[bool, set[str]] = {True: set(), False: set()}
    for node in model.graph.node:
        made[node.name in network].update(node.output)
        used[node.name in network].update(node.input)
    floats = _find_floats(model, (made[True] & used[False]) | (made[False] & used[True]))
    inner, read = made[True] & floats, used[True] & floats
    nodes, declared = [], []
    for node in model.graph.node:
        if node.name not in network:
            for place, name in enumerate(node.input):
                if name in inner:
                    own = f"{name}_for_{node.output[0]}_{place}"
                    nodes.append(onnx.helper.make_node("Identity", [name], [own], name=own))
                    network.add(own)
                    node.input[place] = own
                    declared.append(own)
            declared += [name for name in node.output if name in read]
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in declared
    )


def _find_floats(model: Any, names: set[str]) -> set[str]:
    """Return which values of a model are float32, by the types that ONNX Runtime infers."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    session = open_session(define_scans(probe, opset, inline=False).SerializeToString())
    return {value.name for value in session.get_outputs() if value.type == "tensor(float)"}


def _separate_scan_inputs(model: Any) -> Any:
    """Rename scan inputs to be unique per scan, because the converter names casts after the value."""
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


Reader = Callable[[Path], NDArray[Any]]
"""Reads an image file as the input of a model, without the batch axis."""


def quantize(model: Any, images: Sequence[Path] | None, read: Reader, network: set[str] | None = None) -> Any:
    """Quantize an ONNX model to int8.

    Args:
        model: an `onnx.ModelProto` in float32.
        images: calibration images for static quantization of convolutions and matrix products. `None` selects
            dynamic quantization of matrix products, which computes the ranges of activations at run time.
        read: reads an image as the model's input.
        network: names of the operators to quantize; default: all.

    Raises:
        LightspineError: an image cannot be read.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    with tempfile.TemporaryDirectory() as folder, _quiet_converters():
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        names = None if network is None else sorted(network)
        if images is None:
            quantize_dynamic(
                before,
                after,
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_quantize=names,
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        else:
            reader = _CalibrationReader(images, model.graph.input[0].name, read)
            quantize_static(
                before,
                after,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                nodes_to_quantize=names,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        return onnx.load(after)


class _CalibrationReader:
    """Reads calibration images one by one, in the interface that ONNX Runtime expects."""

    def __init__(self, images: Sequence[Path], name: str, read: Reader):
        self.images = iter(images)
        self.name = name
        self.read = read

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        path = next(self.images, None)
        return None if path is None else {self.name: self.read(path)[None]}


def preprocessed_batches(images: Sequence[Path], read: Reader) -> list[Tensor]:
    """Return the first image and the first three images as batches; for the arguments see `quantize`."""
    arrays = [read(path) for path in images[:3]]
    return [torch.from_numpy(np.stack(some)) for some in (arrays[:1], arrays)]


def image_reader(preprocessing: dict[str, Any], pixels: bool) -> Reader:
    """Create a function that reads an image file as float32 (3, H, W), or as uint8 (H, W, 3) pixels."""
    # Imported here because `import lightspine` loads this module.
    from lightspine.data.transforms import Preprocessing, create_eval_transform

    transform = create_eval_transform(Preprocessing.from_config(preprocessing), normalize=not pixels)

    def read(path: Path) -> NDArray[Any]:
        image = transform(open_image(path))
        return np.ascontiguousarray(image.permute(1, 2, 0) if pixels else image)

    return read


def detector_image_reader(transform: "DetectionTransform", pixels: bool) -> Reader:
    """Create a function that reads an image file as an exported detector takes it.

    That is as pixels (H, W, 3), uint8, or resized and normalized (3, H, W), float32.
    """

    def read(path: Path) -> NDArray[Any]:
        image = np.array(open_image(path))
        if pixels:
            return image
        resized, _ = transform([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
        height, width = resized.image_sizes[0]
        return resized.tensors[0, :, :height, :width].contiguous().numpy()

    return read


def list_calibration_images(folder: Path) -> list[Path]:
    """List up to `MAX_CALIBRATION_IMAGES` images of a folder, searched recursively.

    Raises:
        UsageError: the folder does not exist or contains no images.
    """
    if not folder.is_dir():
        raise UsageError(f"expected a folder of calibration images, but {folder} is not a folder")
    found = list_image_files(folder)
    if not found:
        raise UsageError(f"expected calibration images, but the folder {folder} contains none")
    return found[:: -(-len(found) // MAX_CALIBRATION_IMAGES)]


@contextmanager
def _quiet_converters() -> Iterator[None]:
    """Suppress warnings and log messages of the converters."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
