"""Fake results of `lightspine bench`, with round numbers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.benchmark.results import BenchResult, Mode, PublishedFigures, Row, Source

SYSTEM: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "platform": "Linux-0-made-up",
    "processor": "Made-up processor",
    "processors_usable": 2,
    "torch_threads": 2,
    "devices": ["cpu"],
    "versions": {"python": "3.11.0", "torch": "2.15.0", "timm": "1.0.31", "triton": None},
}
# Model, whose, milliseconds of one image in eager mode, top-1, parameters in millions, multiply-adds in 10^9.
_TABLE: tuple[tuple[str, Source, float, float, float, float], ...] = (
    ("shvit_s1", "lightspine", 8.1, 72.8, 6.3, 0.24),
    ("shvit_s2", "lightspine", 10.4, 75.2, 11.4, 0.37),
    ("shvit_s3", "lightspine", 14.9, 77.4, 14.2, 0.60),
    ("shvit_s4", "lightspine", 26.3, 79.4, 16.5, 0.99),
    ("efficientvim_m1", "lightspine", 9.6, 72.9, 6.7, 0.24),
    ("efficientvim_m2", "lightspine", 13.3, 75.4, 13.9, 0.36),
    ("efficientvim_m3", "lightspine", 20.1, 77.6, 16.6, 0.66),
    ("efficientvim_m4", "lightspine", 31.0, 79.4, 19.6, 1.11),
    ("efficientmod_xxs", "lightspine", 21.0, 76.0, 4.7, 0.58),
    ("efficientmod_xs", "lightspine", 28.2, 78.3, 6.6, 0.78),
    ("efficientmod_s", "lightspine", 45.5, 81.0, 12.9, 1.40),
    ("vmamba_tiny", "lightspine", 148.0, 82.6, 30.2, 4.91),
    ("vim_tiny", "lightspine", 71.0, 76.1, 7.1, 1.60),
    ("timm/mobilenetv2_100", "timm", 12.4, 71.8, 3.5, 0.30),
    ("timm/mobilenetv3_large_100", "timm", 10.8, 75.2, 5.5, 0.22),
    ("timm/mobilevitv2_050", "timm", 17.7, 70.2, 1.4, 0.47),
    ("timm/mobilevitv2_100", "timm", 44.0, 78.1, 4.9, 1.84),
    ("timm/fastvit_t8.apple_in1k", "timm", 19.2, 76.2, 4.0, 0.70),
    ("timm/fastvit_t12.apple_in1k", "timm", 29.0, 79.3, 7.5, 1.40),
    ("timm/efficientformerv2_s0", "timm", 18.0, 73.7, 3.5, 0.40),
    ("timm/efficientformerv2_s1", "timm", 24.5, 77.9, 6.1, 0.65),
    ("timm/mobileone_s1", "timm", 13.6, 75.9, 4.8, 0.82),
    ("timm/fasternet_t0", "timm", 9.0, 71.9, 3.9, 0.34),
    ("timm/fasternet_t2", "timm", 26.1, 78.9, 15.0, 1.91),
    ("timm/swin_tiny_patch4_window7_224", "timm", 171.0, 81.2, 28.3, 4.50),
    ("timm/convnext_tiny", "timm", 139.0, 82.1, 28.6, 4.47),
    ("timm/deit_small_patch16_224", "timm", 118.0, 79.8, 22.1, 4.60),
)
_MODES: dict[Mode, float] = {"eager": 1.0, "optimized": 0.62, "compile": 0.71, "onnx": 0.8, "runtime": 0.7}


def a_timing(median_ms: float, batch: int = 1) -> Timing:
    """Return a timing whose other statistics follow from the median."""
    return Timing(
        median_ms=median_ms, p90_ms=1.25 * median_ms, repeats=30, images_per_s=1000 * batch / median_ms
    )


def a_row(model: str, **changes: Any) -> Row:
    """Return a row (one 224 x 224 image on a CPU, 10 ms) with overrides."""
    values: dict[str, Any] = {
        "source": "timm" if model.startswith("timm/") else "lightspine",
        "mode": "eager",
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "batch": 1,
        "height": 224,
        "width": 224,
        "status": "ok",
        "forward": a_timing(10.0),
    }
    return Row(model=model, **(values | changes))


def a_result(rows: list[Row], *, preset: str | None = None, **changes: Any) -> BenchResult:
    """Return a result with these rows."""
    values: dict[str, Any] = {
        "command": [
            "lightspine",
            "bench",
            *(["--preset", preset] if preset else ["shvit_s1"]),
            "--threads",
            "2",
        ],
        "preset": preset,
        "settings": {"repeats": 30, "warmup": 5, "seed": 0},
        "system": SYSTEM,
        "matmul_gflops": {"float32": 150.0},
        "rows": rows,
    }
    return BenchResult(**(values | changes))


def table_result(
    *, modes: Sequence[Mode] = ("eager", "optimized"), batches: Sequence[int] = (1,)
) -> BenchResult:
    """Return 27 models in several modes and batches; one failed, one ran out of memory, one is missing."""
    rows = []
    for batch in batches:
        for model, source, eager_ms, top1, params_m, macs_g in _TABLE:
            for mode in modes:
                # A little different for each model, so that no two bars are alike.
                factor = _MODES[mode] + (0 if mode == "eager" else 0.004 * (len(model) % 7))
                median_ms = round(eager_ms * factor * batch**0.9, 3)
                rows.append(
                    a_row(
                        model,
                        source=source,
                        mode=mode,
                        batch=batch,
                        forward=a_timing(median_ms, batch),
                        peak_memory_mib=round(40 + 6 * params_m + batch * 11.5 * macs_g, 1),
                        parameters=int(1e6 * params_m),
                        macs=int(1e9 * macs_g),
                        macs_scan=int(2e7 * macs_g) if model.startswith("v") else 0,
                        gflops_per_s=round(2000 * batch * macs_g / median_ms, 2),
                        matmul_share=round(2000 * batch * macs_g / median_ms / 150, 4),
                        published=PublishedFigures(
                            top1=top1, macs_g=macs_g, params_m=params_m, source="a made-up paper, table 1"
                        ),
                    )
                )
    lost: dict[str, Any] = {
        "forward": None,
        "gflops_per_s": None,
        "matmul_share": None,
        "peak_memory_mib": None,
    }
    failed: dict[str, Any] = {"status": "failed", "error": "RuntimeError: the compiler gave up.", **lost}
    rows[1] = replace(rows[1], **failed)
    rows[-1] = replace(rows[-1], status="out_of_memory", error="a forward pass needed over 9000 MiB", **lost)
    rows.append(
        a_row(
            "EdgeViT-XXS",
            source="timm",
            status="absent",
            error="timm has no such model",
            forward=None,
            height=0,
            width=0,
            published=PublishedFigures(top1=74.4, source="a made-up paper, table 1"),
        )
    )
    return a_result(rows, preset="efficientvim-table3")


def sizes_result() -> BenchResult:
    """Return two models at six sizes: one linear in pixels, one superlinear and finally out of memory."""
    sides = (224, 448, 640, 896, 1120, 1344)
    rows = []
    for model, factor, exponent in (("vim_tiny", 2.2e-3, 1.02), ("timm/deit_tiny_patch16_224", 4e-5, 1.35)):
        for index, side in enumerate(sides):
            pixels = side * side
            ms = round(factor * pixels**exponent * (1.03 if index % 2 else 0.98), 2)
            row = a_row(
                model,
                height=side,
                width=side,
                forward=a_timing(ms),
                train_step=a_timing(round(3.1 * ms, 2)),
                peak_memory_mib=round(30 + 1.6e-3 * pixels, 1),
                train_memory_mib=round(90 + 9e-3 * pixels, 1),
                published=PublishedFigures(
                    top1=76.1 if model == "vim_tiny" else 72.2, source="a made-up paper"
                ),
            )
            rows.append(row)
    rows[-1] = replace(
        rows[-1],
        status="out_of_memory",
        error="a forward pass needed over 9000 MiB",
        forward=None,
        train_step=None,
        peak_memory_mib=None,
        train_memory_mib=None,
    )
    return a_result(rows, preset="vim-resolution")


def steps_result() -> BenchResult:
    """Return seven ablation steps of one model with the published value of each."""
    steps = (
        ("a", 640.0, 467, 82.2),
        ("b", 655.0, 464, 82.2),
        ("c", 410.0, 638, 82.2),
        ("d", 305.0, 813, 81.7),
        ("e", 240.0, 1179, 82.2),
        ("f", 198.0, 1340, 82.5),
        ("g", 148.0, 1686, 82.6),
    )
    rows = [
        a_row(
            "vmamba_tiny",
            variant=f"({letter})",
            forward=a_timing(ms),
            published=PublishedFigures(
                top1=top1,
                throughput=float(rate),
                throughput_device="A100, batch 128",
                source="a made-up paper",
            ),
        )
        for letter, ms, rate, top1 in steps
    ]
    return a_result(rows, preset="vmamba-steps")
