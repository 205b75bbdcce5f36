"""Export to ONNX."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch.nn as nn

from lightspine.errors import LightspineError, UsageError
from lightspine.export.metadata import ExportMetadata, count_channels, find_preprocessing, model_name
from lightspine.export.onnx_graph import check_opset, define_scans, to_onnx
from lightspine.export.program import (
    ExportTarget,
    WithPreprocessing,
    check_fixed_size,
    example_input,
    find_target,
    trace,
)
from lightspine.export.quantization import (
    detector_image_reader,
    image_reader,
    list_calibration_images,
    preprocessed_batches,
    quantize,
    to_half,
)
from lightspine.export.verification import (
    DEFAULT_SHAPES,
    RESIZED_TOLERANCE,
    TOLERANCES,
    Difference,
    ExportReport,
    check_differences,
    compare,
    compare_detections,
    open_session,
    random_batches,
    session_function,
    smooth_images,
)
from lightspine.ops.onnx import ScanForm
from lightspine.optimize import optimize
from lightspine.utils.files import atomic_write, check_writable
from lightspine.utils.resource_errors import resource_errors

Precision = Literal["fp32", "fp16", "int8-dynamic", "int8-static"]


@resource_errors()
def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    opset: int = 20,
    precision: Precision = "fp32",
    calibration: str | Path | None = None,
    scan: ScanForm = "loop",
    with_preprocessing: bool = False,
    class_map: bool = False,
    fixed_size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    source: dict[str, str] | None = None,
    checkpoint: Mapping[str, str] | None = None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
) -> ExportReport:
    """Export a model to an ONNX file and compare it with PyTorch in ONNX Runtime.

    The file contains the optimized network (`lightspine.optimize`) in standard ONNX operators. The batch size
    is dynamic, except that a detector takes one image, and, unless `fixed_size` is given, so are height and
    width (at least 32 px). Class names and preprocessing are stored as metadata, so that `lightspine_runtime`
    needs only this file.

    Args:
        model: a classifier, a `features_only` model, a detector (from the image to boxes, scores, labels and
            masks; its `backbone` alone to the levels of the pyramid) or a segmenter; float32, on the CPU, in
            evaluation mode. It is not modified.
        path: the file to write. An existing file is replaced only after the comparison has passed.
        opset: version of the ONNX operator set, see `lightspine.export.onnx_graph.OPSETS`.
        precision: "fp32"; "fp16" (weights and activations, except in the scans); "int8-dynamic" (weights and
            matrix products); "int8-static" (convolutions and activations as well).
        calibration: a folder of images, searched recursively, for "int8-static".
        scan: "loop" keeps each scan as a function of the file (domain "lightspine"), whose body is a loop of
            standard operators; "inlined" replaces the calls by the loops, for runtimes without functions and
            always for int8; "unrolled" is for runtimes without loops and needs `fixed_size`.
        with_preprocessing: the file takes 8-bit pixels (B, H, W, 3) and normalizes them itself; resizing and
            cropping remain with the caller, except for a detector, whose file also resizes the image and
            returns boxes and masks in pixels of the original.
        class_map: the file of a segmenter returns the class of every pixel, int64 (B, H, W), instead of
            logits.
        fixed_size: (height, width) if the file shall take one size only.
        class_names: one name per class.
        preprocessing: see `lightspine.export.metadata.ExportMetadata`; by default the published one.
        source: origin of the weights, stored as metadata.
        checkpoint: metadata of the checkpoint, which the file keeps; see `ExportMetadata`.
        shapes: (batch, height, width) to compare at, by default `DEFAULT_SHAPES`. With "int8-static" the
            calibration images are compared instead, at the size of the preprocessing.

    Raises:
        UsageError: the model is in training mode, options contradict each other, or the opset is not
            supported.
        LightspineError: onnx, onnxscript or onnxruntime is missing, the model cannot be traced, or the file
            cannot be written or differs from PyTorch. No file is left in these cases.
    """
    path = Path(path)
    _check_options(path, precision, calibration, scan, fixed_size, opset)
    check_installed("onnx", "onnxscript", "onnxruntime")
    calibration_images = None if calibration is None else list_calibration_images(Path(calibration))
    target = find_target(model, whole_detector=True, class_map=class_map)
    preprocessing = find_preprocessing(model, preprocessing, fixed_size=fixed_size)
    write = _write_detector if target.kind == "detector" else _write_network
    written = write(
        target,
        _Options(
            opset=opset,
            precision=precision,
            scan=scan,
            pixels=with_preprocessing,
            fixed_size=fixed_size,
            preprocessing=preprocessing,
            channels=count_channels(model, preprocessing),
            calibration_images=calibration_images,
            shapes=shapes,
        ),
    )
    onnx_model = written.model
    metadata = ExportMetadata(
        name=model_name(model),
        kind=target.kind,
        strides=target.strides,
        class_names=None if class_names is None else list(class_names),
        preprocessing=preprocessing,
        pixels=with_preprocessing,
        detection=written.detection,
        precision=precision,
        source=source or {},
        checkpoint=dict(checkpoint or {}),
    )
    for key, value in metadata.entries().items():
        onnx_model.metadata_props.add(key=key, value=value)
    content = onnx_model.SerializeToString()
    differences = written.compare(open_session)
    tolerance = TOLERANCES[precision]
    if with_preprocessing and written.detection is not None and written.detection["resize"] is not None:
        tolerance = max(tolerance, RESIZED_TOLERANCE)
    check_differences(differences, tolerance, metadata.name)
    with atomic_write(path) as file:
        file.write(content)
    return ExportReport(
        path=path,
        bytes=len(content),
        weight_bytes=sum(p.numel() * p.element_size() for p in target.network.parameters()),
        nodes=len(onnx_model.graph.node),
        differences=differences,
        tolerance=tolerance,
    )


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Checked options of `export_onnx`."""

    opset: int
    precision: str
    scan: ScanForm
    pixels: bool
    fixed_size: tuple[int, int] | None
    preprocessing: dict[str, Any]
    channels: int
    calibration_images: list[Path] | None
    shapes: Sequence[tuple[int, int, int]] | None

    @property
    def inline(self) -> bool:
        """Whether scan functions are inlined; ONNX Runtime's quantization knows no functions."""
        return self.scan == "inlined" or self.precision.startswith("int8")


@dataclass(frozen=True, kw_only=True)
class _Written:
    """An `onnx.ModelProto` and how to compare it with PyTorch."""

    model: Any
    compare: Callable[[Callable[[bytes], Any]], list[Difference]]
    detection: dict[str, Any] | None = None


def _write_network(target: ExportTarget, options: _Options) -> _Written:
    """Convert a network with one input of any batch size."""
    network, size = target.network, options.fixed_size
    if options.pixels:
        mean, std = (tuple(options.preprocessing[name]) for name in ("mean", "std"))
        network = WithPreprocessing(network, mean, std)
    sides: tuple[str | int, str | int] = size or ("height", "width")
    model = to_onnx(
        trace(
            optimize(network),
            example_input(options.channels, size, options.pixels),
            fixed=size is not None,
        ),
        opset=options.opset,
        scan=options.scan,
        inputs={"pixels": ("batch", *sides, options.channels)}
        if options.pixels
        else {"images": ("batch", options.channels, *sides)},
        output_names=target.outputs,
    )
    if options.precision == "fp16":
        model = to_half(model)
    model = define_scans(model, options.opset, inline=options.inline)
    read = image_reader(options.preprocessing, options.pixels)
    if options.precision.startswith("int8"):
        model = quantize(model, options.calibration_images, read)

    def compare_with_pytorch(open_content: Callable[[bytes], Any]) -> list[Difference]:
        if options.calibration_images is None:
            fixed_shapes = None if size is None else [(count, *size) for count in (1, 3)]
            shapes = fixed_shapes or options.shapes or DEFAULT_SHAPES
            batches = random_batches(options.channels, shapes, pixels=options.pixels)
        else:
            # Static quantization clips values outside of the calibrated ranges, as random images have.
            batches = preprocessed_batches(options.calibration_images, read)
        return compare(network, session_function(open_content(model.SerializeToString())), batches)

    return _Written(model=model, compare=compare_with_pytorch)


def _write_detector(target: ExportTarget, options: _Options) -> _Written:
    """Convert a whole detector of one image."""
    # Imported here because it loads torchvision's detectors, and `import lightspine` loads this module.
    from lightspine.export.detection import (
        WholeDetector,
        detection_settings,
        lower_threshold,
        network_nodes,
        to_detector_onnx,
        with_threshold,
    )

    detector: Any = target.network
    model = to_detector_onnx(
        detector,
        opset=options.opset,
        scan=options.scan,
        precision=options.precision,
        channels=options.channels,
        pixels=options.pixels,
        fixed_size=options.fixed_size,
    )
    model = define_scans(model, options.opset, inline=options.inline)
    if options.precision.startswith("int8"):
        read = detector_image_reader(detector.transform, options.pixels)
        model = quantize(model, options.calibration_images, read, network_nodes(model))

    def compare_with_pytorch(open_content: Callable[[bytes], Any]) -> list[Difference]:
        shapes = (
            [options.fixed_size] if options.fixed_size else [s[1:] for s in options.shapes or DEFAULT_SHAPES]
        )
        images = smooth_images(options.channels, shapes, pixels=options.pixels)
        # A lower threshold, because random images have few objects.
        reference = with_threshold(detector)
        session = open_content(
            lower_threshold(model, detection_settings(reference).score_threshold).SerializeToString()
        )
        return compare_detections(
            WholeDetector(reference, options.pixels), session_function(session), images, options.precision
        )

    return _Written(model=model, compare=compare_with_pytorch, detection=asdict(detection_settings(detector)))


def check_installed(*packages: str) -> None:
    """Check that packages which an export needs are installed.

    Raises:
        LightspineError: one of them is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise LightspineError(
                f"an export needs {package}, which is not installed: pip install 'lightspine[export]'"
            )


def _check_options(
    path: Path,
    precision: str,
    calibration: str | Path | None,
    scan: str,
    fixed_size: tuple[int, int] | None,
    opset: int,
) -> None:
    if path.suffix != ".onnx":
        raise UsageError(f"expected a file name that ends in .onnx, got {path.name!r}")
    if precision not in get_args(Precision):
        raise UsageError(f"expected a precision of {', '.join(get_args(Precision))}, got {precision!r}")
    if scan not in get_args(ScanForm):
        raise UsageError(f"expected a scan of {', '.join(get_args(ScanForm))}, got {scan!r}")
    if scan == "unrolled" and fixed_size is None:
        raise UsageError("an unrolled scan has one step per patch of the image: expected a fixed size")
    if precision == "int8-static" and calibration is None:
        raise UsageError("the precision int8-static needs a folder of calibration images, got none")
    if precision != "int8-static" and calibration is not None:
        raise UsageError(
            f"calibration images are for the precision int8-static only, got them with {precision}"
        )
    check_opset(opset)
    check_fixed_size(fixed_size)
    check_writable(path)
