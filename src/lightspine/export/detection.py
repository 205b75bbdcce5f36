"""A whole detector as one ONNX graph: resizing, network, decoding, NMS and masks in the size of the image.

The graph is joined from three parts. The first resizes, normalizes and pads the image; its sizes are computed
in float64, as Python does. The second is the detector, traced from its own PyTorch code. The third, also
traced, moves boxes and masks to the original image.
"""

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn as nn
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lightspine.export.onnx_graph import to_onnx
from lightspine.export.program import export_program
from lightspine.export.quantization import to_half
from lightspine.heads.detection_transform import DetectionTransform, paste_whole_masks, resized_size
from lightspine.heads.mask_rcnn import MaskRCNN
from lightspine.heads.retinanet import RetinaNet
from lightspine.ops.onnx import ScanForm
from lightspine.optimize import optimize

Detector: TypeAlias = RetinaNet | MaskRCNN

DIVISOR = 32
"""Size divisor: images are padded to multiples of it, in pixels."""

_EXAMPLE = 384, 320
_FEW_CLASSES = 10
# Where a path from a layer back to the image leaves the network: boxes, sizes and selections.
_ENDS = ("RoiAlign", "Shape", "NonZero")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_THRESHOLD = "score_thresh"
# Inner names, which no part may use for another value.
_BATCH, _SIZE, _ORIGINAL = "padded_images", "image_size", "original_size"
_INNER_BOXES, _INNER_MASKS = "boxes_of_images", "masks_of_boxes"


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """How an exported detector treats images and detections; stored as metadata.

    Attributes:
        resize: shorter side and maximum longer side of the resized image, `None` for no resizing.
        rounding: see `lightspine.heads.detection_transform.DetectionTransform`.
        score_threshold: minimum score of a detection.
        nms_threshold: IoU above which a detection is suppressed by a better one of its class.
        detections_per_image: maximum number of detections.
    """

    resize: tuple[int, int] | None
    rounding: str
    score_threshold: float
    nms_threshold: float
    detections_per_image: int


def detection_settings(detector: Detector) -> DetectionSettings:
    """Return the settings of a detector."""
    transform = _transform(detector)
    head: Any = detector if isinstance(detector, RetinaNet) else detector.roi_heads
    return DetectionSettings(
        resize=(int(transform.min_size[0]), int(transform.max_size)) if transform.resizes else None,
        rounding=transform.rounding,
        score_threshold=float(head.score_thresh),
        nms_threshold=float(head.nms_thresh),
        detections_per_image=int(head.detections_per_img),
    )


def detector_outputs(detector: Detector) -> tuple[str, ...]:
    """Return the ONNX output names of a detector: boxes, scores, labels and perhaps masks."""
    names = ("boxes", "scores", "labels")
    return names if isinstance(detector, RetinaNet) else (*names, "masks")


class WholeDetector(nn.Module):
    """A detector as its exported file computes it, in PyTorch: for one image, with masks as booleans.

    Args:
        detector: in evaluation mode.
        pixels: take an 8-bit image of any size, `(1, H, W, 3)`; otherwise a resized and normalized one,
            `(1, C, H, W)`.
    """

    def __init__(self, detector: Detector, pixels: bool):
        super().__init__()
        self.detector = detector
        self.pixels = pixels
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of `detector_outputs`, boxes and masks in pixels of the given image."""
        if self.pixels:
            (found,) = self.detector([image[0].permute(2, 0, 1).float() / 255])
        else:
            sides = image.shape[2:]
            bottom, right = (-side % DIVISOR for side in sides)
            batch = nn.functional.pad(image, (0, right, 0, bottom))
            size = (sides[0], sides[1])
            found = self.detector.detect(batch, [size])[0]
            found = _transform(self.detector).postprocess([found], [size], [size])[0]
        masks = (found["masks"][:, 0] >= 0.5,) if "masks" in found else ()
        return (found["boxes"], found["scores"], found["labels"], *masks)


def to_detector_onnx(
    detector: Detector,
    *,
    opset: int,
    scan: ScanForm,
    precision: str,
    channels: int,
    pixels: bool,
    fixed_size: tuple[int, int] | None,
) -> Any:
    """Convert a detector to an `onnx.ModelProto` for one image; see `WholeDetector` for what it computes.

    Args:
        detector: in evaluation mode.
        opset: see `lightspine.export.onnx_graph.OPSETS`.
        scan: see `lightspine.ops.onnx.scan_table`.
        precision: "fp16" converts the network; the file computes sizes, boxes and masks in float32. Otherwise
            the graph is in float32.
        channels: number of channels of the images.
        pixels: see `WholeDetector`.
        fixed_size: (height, width) if the file shall take one size only.

    Raises:
        LightspineError: PyTorch cannot trace the detector, or the opset lacks an operator.
    """
    settings, transform = detection_settings(detector), _transform(detector)
    half = precision == "fp16"
    masks = "masks" in detector_outputs(detector)
    size = fixed_size or ("height", "width")
    axes = (1, *size, channels) if pixels else (1, channels, *size)
    first = preparation_model(transform, settings, opset, channels, pixels, axes)
    resizes = pixels and settings.resize is not None
    padded = None
    if fixed_size is not None:
        inner = fixed_size
        if pixels and settings.resize is not None:
            inner = resized_size(fixed_size, *settings.resize, transform.rounding)
        padded = tuple(-(-side // DIVISOR) * DIVISOR for side in inner)
    core = to_onnx(
        _trace_core(_with_named_threshold(optimize(_Core(detector))), channels, padded),
        opset=opset,
        scan=scan,
        inputs={_BATCH: (1, channels, *(padded or ("padded_height", "padded_width"))), _SIZE: (2,)},
        output_names=(_INNER_BOXES if resizes else "boxes", "scores", "labels", *([_INNER_MASKS] * masks)),
    )
    parts = [first, to_half(core, network_nodes(core)) if half else core]
    if resizes or masks:
        parts.append(_placement(opset, "pixels" if pixels else "images", axes, resizes, masks))
    shapes = {"boxes": ("detections", 4), "masks": ("detections", *size)}
    return _join(parts, {name: shapes.get(name, ("detections",)) for name in detector_outputs(detector)})


def network_nodes(model: Any) -> set[str]:
    """Return the names of the operators of the network itself, without decoding, NMS and pasting.

    These are the layers with weights, and what they are computed from up to the image or the RoIAlign.

    Args:
        model: an `onnx.ModelProto`.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name for tensor in model.graph.initializer}
    found: set[str] = set()
    open_nodes = [
        node
        for node in model.graph.node
        if node.op_type in _LAYERS and not weights.isdisjoint(node.input[1:])
    ]
    while open_nodes:
        node = open_nodes.pop()
        if node.name in found or node.op_type in _ENDS:
            continue
        found.add(node.name)
        open_nodes += [producers[name] for name in node.input if name in producers]
    return found


def with_threshold(detector: Detector) -> Detector:
    """Return a copy of a detector that also returns detections of low scores, to compare many of them."""
    changed = copy.deepcopy(detector)
    if isinstance(changed, RetinaNet):
        changed.score_thresh = 0.0
    elif len(changed.roi_heads.box_predictor[0].cls_score.bias) <= _FEW_CLASSES:
        # With more classes, all proposals of all classes would be too many for NMS.
        changed.roi_heads.score_thresh = 0.0
    return changed


def lower_threshold(model: Any, value: float) -> Any:
    """Return a copy of a detector's `onnx.ModelProto` with another score threshold."""
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name.endswith(_THRESHOLD):
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, onnx.TensorProto.FLOAT, [], [value]))
    return changed


class _Core(nn.Module):
    """A detector of a normalized and padded batch of one image with its height and width, int64 (2,)."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        self.eval()

    def forward(self, batch: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.detector.detect(batch, [(size[0], size[1])])
        return tuple(found[name] for name in ("boxes", "scores", "labels", "masks") if name in found)


def _with_named_threshold(core: _Core) -> _Core:
    """Make the score threshold a buffer, which has a name in the file, unlike a constant."""
    head: Any = core.detector if isinstance(core.detector, RetinaNet) else core.detector.roi_heads
    threshold = head.__dict__.pop(_THRESHOLD)
    head.register_buffer(_THRESHOLD, torch.tensor(float(threshold)))
    return core


class _Placement(nn.Module):
    """Moves the boxes of a resized image to the original one, and pastes the masks into it."""

    def __init__(self, resizes: bool, channels_last: bool):
        super().__init__()
        self.resizes = resizes
        self.channels_last = channels_last

    def forward(
        self, image: Tensor, original: Tensor, size: Tensor, boxes: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        outputs = []
        if self.resizes:
            ratio = original.to(boxes) / size.to(boxes)
            boxes = boxes * torch.stack([ratio[1], ratio[0]]).repeat(2)
            outputs.append(boxes)
        if masks is not None:
            height, width = image.shape[1:3] if self.channels_last else image.shape[2:]
            outputs.append(paste_whole_masks(masks, boxes, (height, width)) >= 0.5)
        return tuple(outputs)


def _transform(detector: Detector) -> DetectionTransform:
    transform: Any = detector.transform
    return transform


def _trace_core(core: nn.Module, channels: int, padded: tuple[int, ...] | None) -> ExportedProgram:
    sides = padded or _EXAMPLE
    dynamic: Any = None
    if padded is None:
        # Whole multiples keep the sizes of all levels simple, without which tracing takes minutes.
        dynamic = ({2: DIVISOR * Dim("rows"), 3: DIVISOR * Dim("columns")}, {})
    inputs = torch.randn(1, channels, *sides), torch.tensor(sides)
    return export_program(core, inputs, dynamic, "detector")


def _placement(opset: int, image_name: str, axes: tuple[int | str, ...], resizes: bool, masks: bool) -> Any:
    """Return the mapping of boxes and masks to the original image as an `onnx.ModelProto`."""
    channels_last = image_name == "pixels"
    example = [side if isinstance(side, int) else 96 + 32 * place for place, side in enumerate(axes)]
    image = torch.zeros(*example, dtype=torch.uint8 if channels_last else torch.float32)
    boxes = torch.tensor([[4.0, 8.0, 40.0, 60.0]] * 3)
    inputs = (
        image,
        torch.tensor([96, 128]),
        torch.tensor([48, 64]),
        boxes,
        *([torch.rand(3, 1, 28, 28)] * masks),
    )
    count = Dim("count", min=0)
    free = {place: Dim.DYNAMIC for place, side in enumerate(axes) if isinstance(side, str)}
    dynamic = (free, {}, {}, {0: count}, *([{0: count}] * masks))
    names = {
        image_name: axes,
        _ORIGINAL: (2,),
        _SIZE: (2,),
        _INNER_BOXES if resizes else "boxes": ("detections", 4),
    }
    if masks:
        names[_INNER_MASKS] = ("detections", 1, 28, 28)
    return to_onnx(
        export_program(_Placement(resizes, channels_last), inputs, dynamic, "detector"),
        opset=opset,
        scan="loop",
        inputs=names,
        output_names=(*(["boxes"] * resizes), *(["masks"] * masks)),
    )


_SHAPES = """
  {original} = Shape<start=2, end=4>(image)
"""

# In float64, in which Python computes the sizes: float32 would round some sides to another pixel.
_RESIZE = """
  one = Constant<value_ints=[1]>()
  sides = Cast<to=11>({original})
  shortest = ReduceMin<keepdims=0>(sides)
  longest = ReduceMax<keepdims=0>(sides)
  by_shorter = Div(shorter, shortest)
  by_longer = Div(longer, longest)
  factor = Min(by_shorter, by_longer)
  scaled = Mul(sides, factor)
  shifted = Add(scaled, rounding)
  floored = Floor(shifted)
  whole = Cast<to=7>(floored)
  {size} = Max(whole, one)
"""

# Bilinear resizing along one axis, with positions in float64. ONNX Runtime's `Resize` has them in float32: a
# value in the middle of two 8-bit values, frequent where the sides have a ratio such as 7 to 8, is then
# rounded to the other one than in PyTorch.
_RESIZE_AXIS = """
  {name}_index = Constant<value_int={index}>()
  {name}_length = Gather<axis=0>({original}, {name}_index)
  {name}_new_length = Gather<axis=0>({size}, {name}_index)
  {name}_from = Cast<to=11>({name}_length)
  {name}_to = Cast<to=11>({name}_new_length)
  {name}_ratio = Div({name}_from, {name}_to)
  {name}_zero = Constant<value_int=0>()
  {name}_one = Constant<value_int=1>()
  {name}_steps = Range({name}_zero, {name}_new_length, {name}_one)
  {name}_numbers = Cast<to=11>({name}_steps)
  {name}_centers = Add({name}_numbers, half)
  {name}_scaled = Mul({name}_centers, {name}_ratio)
  {name}_shifted = Sub({name}_scaled, half)
  {name}_positions = Max({name}_shifted, nothing)
  {name}_whole = Floor({name}_positions)
  {name}_share = Sub({name}_positions, {name}_whole)
  {name}_share_32 = Cast<to=1>({name}_share)
  {name}_shares_shape = Constant<value_ints={shape}>()
  {name}_second_share = Reshape({name}_share_32, {name}_shares_shape)
  {name}_first_share = Sub(all, {name}_second_share)
  {name}_last = Sub({name}_length, {name}_one)
  {name}_floored = Cast<to=7>({name}_whole)
  {name}_first = Min({name}_floored, {name}_last)
  {name}_next = Add({name}_first, {name}_one)
  {name}_second = Min({name}_next, {name}_last)
  {name}_first_pixels = Gather<axis={axis}>({source}, {name}_first)
  {name}_second_pixels = Gather<axis={axis}>({source}, {name}_second)
  {name}_first_part = Mul({name}_first_pixels, {name}_first_share)
  {name}_second_part = Mul({name}_second_pixels, {name}_second_share)
  {result} = Add({name}_first_part, {name}_second_part)
"""

_PAD = """
  divisor = Constant<value_int={divisor}>()
  negative = Neg({size})
  missing = Mod(negative, divisor)
  no_pads = Constant<value_ints=[0, 0, 0, 0, 0, 0]>()
  pads = Concat<axis=0>(no_pads, missing)
  {batch} = Pad(normalized, pads)
"""


def preparation_model(
    transform: DetectionTransform,
    settings: DetectionSettings,
    opset: int,
    channels: int,
    pixels: bool,
    axes: tuple[int | str, ...],
) -> Any:
    """Return the image preprocessing of a detector as an `onnx.ModelProto`.

    Args:
        transform: mean and standard deviation of the images.
        settings: size and rounding of resized images.
        opset: version of the ONNX operator set.
        channels: number of channels.
        pixels: take 8-bit images (1, H, W, C), which are resized; otherwise prepared ones, (1, C, H, W).
        axes: sizes or names of the input's dimensions.
    """
    import onnx

    resizes = pixels and settings.resize is not None
    lines = _SHAPES
    if resizes:
        lines += _RESIZE
        places = {"original": _ORIGINAL, "size": _SIZE}
        # First along rows, as PyTorch does.
        lines += _RESIZE_AXIS.format(
            name="width", index=1, axis=3, shape="[-1]", source="image", result="widened", **places
        )
        lines += _RESIZE_AXIS.format(
            name="height", index=0, axis=2, shape="[-1, 1]", source="widened", result="resized", **places
        )
    else:
        lines += "  {size} = Identity({original})\n  resized = Identity(image)\n"
    if pixels:
        moved = "  moved = Transpose<perm=[0, 3, 1, 2]>(pixels)\n  image = Cast<to=1>(moved)\n"
        rounded = "Round" if resizes and settings.rounding == "nearest" else "Identity"
        lines = (
            moved
            + lines
            + f"  whole_pixels = {rounded}(resized)\n  scaled_pixels = Div(whole_pixels, full)\n"
        )
        lines += "  centered = Sub(scaled_pixels, mean)\n  normalized = Div(centered, std)\n"
    else:
        lines = "  image = Identity(images)\n" + lines + "  normalized = Identity(resized)\n"
    lines = (lines + _PAD).format(original=_ORIGINAL, size=_SIZE, batch=_BATCH, divisor=DIVISOR)
    kind, name = ("uint8", "pixels") if pixels else ("float", "images")
    shape = ", ".join(map(str, axes))
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
        f"preparation ({kind}[{shape}] {name}) => "
        f"(float[1, {channels}, padded_height, padded_width] {_BATCH}, int64[2] {_SIZE}, "
        f"int64[2] {_ORIGINAL})\n"
        f"{{\n{lines}}}"
    )
    constants: dict[str, tuple[Any, list[float], list[int]]] = {}
    if pixels:
        constants |= {
            "full": (onnx.TensorProto.FLOAT, [255.0], []),
            "mean": (onnx.TensorProto.FLOAT, list(transform.image_mean), [1, channels, 1, 1]),
            "std": (onnx.TensorProto.FLOAT, list(transform.image_std), [1, channels, 1, 1]),
        }
    if resizes:
        assert settings.resize is not None
        constants |= {
            "shorter": (onnx.TensorProto.DOUBLE, [float(settings.resize[0])], []),
            "longer": (onnx.TensorProto.DOUBLE, [float(settings.resize[1])], []),
            "rounding": (onnx.TensorProto.DOUBLE, [0.5 if settings.rounding == "nearest" else 0.0], []),
            "half": (onnx.TensorProto.DOUBLE, [0.5], []),
            "nothing": (onnx.TensorProto.DOUBLE, [0.0], []),
            "all": (onnx.TensorProto.FLOAT, [1.0], []),
        }
    for constant, (dtype, values, dims) in constants.items():
        model.graph.initializer.append(onnx.helper.make_tensor(constant, dtype, dims, values))
    return model


def _join(parts: list[Any], outputs: dict[str, tuple[int | str, ...]]) -> Any:
    """Join the parts of a detector to one model; values of the same name are connected.

    Args:
        parts: `onnx.ModelProto` in the order in which they run. The names of their inner values are changed.
        outputs: name of each output of the whole -> its axes.
    """
    import onnx
    import onnx.compose

    first, core, *last = parts
    renamed = [
        onnx.compose.add_prefix(part, prefix, rename_inputs=False, rename_outputs=False)
        for part, prefix in ((first, "preparation/"), *((part, "placement/") for part in last))
    ]
    joined = onnx.ModelProto()
    joined.CopyFrom(core)
    graph = joined.graph
    for field in (graph.node, graph.input, graph.output):
        del field[:]
    pieces = [renamed[0], core, *renamed[1:]]
    for piece in pieces:
        graph.node.extend(piece.graph.node)
        if piece is not core:
            graph.initializer.extend(piece.graph.initializer)
    graph.input.extend(first.graph.input)
    known = {value.name: value for piece in pieces for value in piece.graph.output}
    for name, axes in outputs.items():
        kind = known[name].type.tensor_type.elem_type
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, axes))
    return joined
