"""Tables of `lightspine bench`."""

from typing import Any

from lightspine_cli._output import print_pairs, print_table, print_text, with_thousands

_MODEL_COLUMNS = (
    "model",
    "library",
    "mode",
    "dtype",
    ">batch",
    ">size",
    ">median ms",
    ">p90 ms",
    ">p99 ms",
    ">images/s",
    ">first s",
    ">MiB",
    ">params",
    ">MMACs",
    ">scan %",
    ">GFLOP/s",
    ">% of matmul",
    ">published top-1",
    ">published images/s",
)
_TRAIN_COLUMNS = (">train ms", ">train images/s", ">train first s", ">train MiB")
_TIME_COLUMNS = (
    "shape",
    ">batch",
    ">elementwise ms",
    ">forward ms",
    ">/ elementwise",
    ">reference x",
    ">torch x",
    ">forward+backward ms",
    ">/ forward",
    ">torch x",
)
_TIME_NOTES = (
    ("elementwise", "PyTorch's softplus over (B, K D, L) and exp over (B, K D, L, N), preallocated outputs"),
    ("reference x", "time of backend `reference` divided by forward ms (batch 1 only)"),
    ("torch x", "time of backend `torch` divided by forward ms, and by forward+backward ms (batch 1 only)"),
)
_MEMORY_COLUMNS = (
    "shape",
    ">batch",
    ">inputs MiB",
    ">outputs MiB",
    ">forward peak / outputs",
    ">backward peak / inputs",
)
_MEMORY_NOTE = ("peak", "memory added by the pass at its peak, including its results, in a separate process")
_CUDA_COLUMNS = (
    "operator",
    "shape",
    ">batch",
    "dtype",
    ">first call s",
    ">forward ms",
    ">copy %",
    ">special %",
    ">MiB",
    ">first call s",
    ">forward+backward ms",
    ">copy %",
    ">special %",
    ">MiB",
)
_CUDA_NOTES = (
    ("first call", "with compiling the kernels that no row above has used and that are not on disk"),
    (
        "copy %",
        "time of reading inputs and writing outputs once at the copy rate, divided by the measured time",
    ),
    ("special %", "time of the exponentials, logarithms and reciprocals, divided by the measured time"),
    ("MiB", "peak of PyTorch's allocator above the inputs"),
)


def print_models(result: Any) -> None:
    """Print a `lightspine.benchmark.results.BenchResult`."""
    system = result.system
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in result.matmul_gflops.items())
    devices = [name for name in system["devices"] if name.startswith("cuda")]
    print_pairs(
        [
            ("processor", f"{system['processor']}, threads: {result.settings['threads']}"),
            *[("device", name) for name in devices if result.settings["device"] == "cuda"],
            ("torch, timm", f"{system['versions']['torch']}, {system['versions']['timm']}, {system['date']}"),
            ("load before", _load_text(system.get("load_average"))),
            ("matrix product", rates),
        ]
    )
    print_text()
    training = any(row.train_step is not None or row.train_memory_mib is not None for row in result.rows)
    columns = (*_MODEL_COLUMNS, *_TRAIN_COLUMNS) if training else _MODEL_COLUMNS
    shown = [row for row in result.rows if row.status == "ok" or row.forward is not None]
    print_table(columns, [_model_cells(row)[: len(columns)] for row in shown])
    others = [row for row in result.rows if row.status != "ok"]
    if others:
        print_text()
        print_table(
            ("not measured", "library", "mode", "dtype", ">batch", ">size", "", "reason"),
            [(*_row_conditions(row), row.status.replace("_", " "), row.error or "") for row in others],
        )


def print_presets(presets: list[Any]) -> None:
    """Print a list of `lightspine.benchmark.presets.Preset`."""
    print_table(
        ("preset", ">models", ">absent", "title"),
        [
            (
                preset.name,
                str(sum(spec.absent is None for spec in preset.specs)),
                str(sum(spec.absent is not None for spec in preset.specs)),
                preset.title,
            )
            for preset in presets
        ],
    )


def print_ops(report: Any) -> None:
    """Print a `lightspine.benchmark.ops.OpsReport`."""
    system, load = report.system, report.load_before
    print_pairs(
        [
            ("processor", f"{system['processor']}, threads: {report.threads}"),
            ("torch", f"{system['versions']['torch']}, {system['date']}"),
            ("load before", _load_text(load)),
        ]
    )
    if timed := [_time_cells(row) for row in report.rows if row.times]:
        print_text()
        print_table(_TIME_COLUMNS, timed, title=f"medians of up to {report.repeats} interleaved calls")
        print_text()
        print_pairs(_TIME_NOTES)
    if measured := [_memory_cells(row) for row in report.rows if row.memory is not None]:
        print_text()
        print_table(_MEMORY_COLUMNS, measured)
        print_text()
        print_pairs([_MEMORY_NOTE])
    if report.shares:
        print_text()
        print_table(
            ("model, batch 1, 224 pixels", ">forward ms", ">scans ms", ">share %"),
            [
                (name, f"{share.forward_ms:.1f}", f"{share.scan_ms:.1f}", f"{100 * share.share:.1f}")
                for name, share in report.shares.items()
            ],
        )
    if report.saved:
        print_text()
        print_table(
            ("activations saved for the backward pass", ">bytes per token", ">with recomputation", "default"),
            [
                (entry.block, f"{entry.saved:,.0f}", f"{entry.recomputed:,.0f}", entry.default)
                for entry in report.saved
            ],
        )


def print_loading(report: Any) -> None:
    """Print a `lightspine.benchmark.data_loading.LoadingReport`."""
    system = report.system
    print_pairs(
        [
            ("folder", report.folder),
            ("batches", f"{report.batch} images, {report.size} px, augmentation {report.augmentation}"),
            ("loading decodes on", report.decode),
            ("processor", f"{system['processor']}, usable: {system['processors_usable']}"),
            ("load before", _load_text(report.load_before)),
        ]
    )
    print_text()
    print_table(
        ("part", ">workers", ">images", ">images/s", ">images/s per core", ">ms of a core per image"),
        [
            (
                row.part,
                str(row.workers),
                str(row.images),
                f"{row.images_per_s:,.0f}",
                f"{row.images_per_core_s:,.0f}",
                f"{1000 / row.images_per_core_s:.2f}",
            )
            for row in report.rows
        ],
    )
    print_text()
    print_pairs([("per core", "images per second of processor time of all processes")])


def print_cuda_ops(report: Any) -> None:
    """Print a `lightspine.benchmark.ops_cuda.CudaOpsReport`."""
    versions, rate = report.system["versions"], report.copy_bytes_per_s
    print_pairs(
        [
            ("device", report.device),
            ("torch, triton", f"{versions['torch']}, {versions['triton']}, {report.system['date']}"),
            ("copy rate", "not measured" if rate is None else f"{rate / 1e9:,.0f} GB/s"),
            ("special functions", f"{report.special_functions_per_s / 1e12:.2f} T/s"),
        ]
    )
    print_text()
    title = f"medians of up to {report.repeats} interleaved calls, time of the device"
    print_table(_CUDA_COLUMNS, [_cuda_cells(row) for row in report.rows if row.error is None], title=title)
    print_text()
    print_pairs(_CUDA_NOTES)
    if failed := [row for row in report.rows if row.error is not None]:
        print_text()
        print_table(
            ("not measured", "shape", ">batch", "dtype", "reason"),
            [(row.operator, row.case.name, str(row.batch), row.dtype, row.error) for row in failed],
        )


def _cuda_cells(row: Any) -> tuple[str, ...]:
    from lightspine.benchmark.ops_cuda import PASSES

    cells = [row.operator, row.case.name, str(row.batch), row.dtype]
    for name in PASSES:
        timing, peak = row.times.get(name), row.peak_bytes.get(name)
        cells += [
            f"{row.first_call_s[name]:.2f}",
            _format_number(timing and timing.median_ms, 3),
            _format_number(timing and 100 * row.copy_share(name), 0),
            _format_number(timing and 100 * row.special_function_share(name), 0),
            _format_number(None if peak is None else peak / 2**20, 0),
        ]
    return tuple(cells)


def _row_conditions(row: Any) -> tuple[str, ...]:
    name = f"{row.model} ({row.variant})" if row.variant else row.model
    size = f"{row.height}x{row.width}" if row.height else "-"
    return (name, row.source, row.mode, row.dtype, str(row.batch) if row.batch else "-", size)


def _model_cells(row: Any) -> tuple[str, ...]:
    forward, published = row.forward, row.published
    return (
        *_row_conditions(row),
        _format_number(forward and forward.median_ms, 1),
        _format_number(forward and forward.p90_ms, 1),
        _format_number(forward and forward.p99_ms, 1),
        _format_number(forward and forward.images_per_s, 1),
        _format_number(forward and forward.first_call_s, 1),
        _format_number(row.peak_memory_mib, 0),
        with_thousands(row.parameters),
        _format_number(None if row.macs is None else row.macs / 1e6, 0),
        _format_number(100 * row.macs_scan / row.macs if row.macs else None, 1),
        _format_number(row.gflops_per_s, 1),
        _format_number(None if row.matmul_share is None else 100 * row.matmul_share, 0),
        _format_number(published and published.top1, 1),
        _format_number(published and published.throughput, 0),
        _format_number(row.train_step and row.train_step.median_ms, 1),
        _format_number(row.train_step and row.train_step.images_per_s, 1),
        _format_number(row.train_step and row.train_step.first_call_s, 1),
        _format_number(row.train_memory_mib, 0),
    )


def _format_number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _time_cells(row: Any) -> tuple[str, ...]:
    from lightspine.benchmark import ops

    ms = {name: timing.median_ms for name, timing in row.times.items()}
    forward, backward = ms[ops.FORWARD], ms[ops.FORWARD_BACKWARD]

    def ratio(name: str, base: float) -> str:
        return f"{ms[name] / base:.1f}" if name in ms else "-"

    return (
        row.case.name,
        str(row.batch),
        f"{ms[ops.ELEMENTWISE]:.2f}",
        f"{forward:.2f}",
        f"{forward / ms[ops.ELEMENTWISE]:.2f}",
        ratio(ops.REFERENCE_FORWARD, forward),
        ratio(ops.TORCH_FORWARD, forward),
        f"{backward:.2f}",
        f"{backward / forward:.2f}",
        ratio(ops.TORCH_FORWARD_BACKWARD, backward),
    )


def _memory_cells(row: Any) -> tuple[str, ...]:
    memory = row.memory
    return (
        row.case.name,
        str(row.batch),
        f"{memory.inputs / 2**20:.2f}",
        f"{memory.outputs / 2**20:.2f}",
        f"{memory.forward / memory.outputs:.3f}",
        f"{memory.backward / memory.inputs:.2f}",
    )


def _load_text(load: float | None) -> str:
    return "unknown" if load is None else f"{load:.2f}"
