"""Run the Triton kernels on a CPU and print their error against the reference as JSON.

A program of its own, because Triton decides at the first import whether kernels are compiled or interpreted:
`TRITON_INTERPRET=1 python -m support.triton_cases fast` in `tests/` prints
{case: {tensor: [difference, tolerance]}}.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

import lightspine
from lightspine.blocks import VimMixer
from lightspine.ops import bidirectional_scan, causal_conv1d, cross_scan, register_scan_order
from lightspine.ops.add_norm import add_norm
from lightspine.ops.inputs import SelectiveScanInputs
from lightspine.optimize import target
from support.reference import read_figure, relative_l2
from support.scans import (
    TOLERANCE,
    ConvInputs,
    bidirectional_inputs,
    conv_inputs,
    convert,
    cross_inputs,
    figure_inputs,
    results_and_gradients,
    run_scan,
    scan_inputs,
)

Report = dict[str, tuple[float, float]]
F64 = torch.float64


def run_cross(inputs: Any, **options: Any) -> Tensor:
    return cross_scan(*inputs, **options)


def run_both(inputs: SelectiveScanInputs, **options: Any) -> Tensor:
    return bidirectional_scan(*inputs, delta_softplus=True, **options)


def run_conv(inputs: ConvInputs, **options: Any) -> Tensor:
    return causal_conv1d(*inputs, **options)


def compare_conv(
    dtype: torch.dtype, *, silu: bool = True, reverse: tuple[bool, ...] = (False, True), **sizes: int
) -> Report:
    return compare(run_conv, conv_inputs(groups=len(reverse), **sizes), dtype, silu=silu, reverse=reverse)


def cut_both(inputs: SelectiveScanInputs, dtype: torch.dtype = F64) -> Report:
    with short_chunks():
        return compare(run_both, inputs, dtype)


@contextmanager
def cpu_tensors_on_triton() -> Iterator[None]:
    """Make "auto" select the Triton kernels for CPU tensors, as it does for CUDA tensors."""
    from lightspine.ops import dispatch

    dispatch._choose_backend.cache_clear()
    dispatch._KERNELS_BY_DEVICE["cpu"] = "triton"
    try:
        yield
    finally:
        dispatch._KERNELS_BY_DEVICE["cpu"] = "cpu"
        dispatch._choose_backend.cache_clear()


def vim_mixer(*, optimized: bool = False, **options: Any) -> Report:
    """Compare Vim's mixer and its gradients with a mixer that scans the directions separately."""
    torch.manual_seed(0)
    mixer = VimMixer(8, state_dim=3, **options).double()
    x = torch.randn(2, 8, 2, 3, dtype=F64, requires_grad=True)
    run: Any = mixer
    if optimized:
        with mock.patch.object(target, "on_cuda", return_value=True):
            run = lightspine.optimize(mixer.eval())

    def results() -> dict[str, Tensor]:
        out = run(x)
        inputs = {"x": x, **({} if optimized else dict(mixer.named_parameters()))}
        grads = torch.autograd.grad(out.square().sum(), tuple(inputs.values()))
        return {"output": out.detach(), **{f"grad {name}": g for name, g in zip(inputs, grads, strict=True)}}

    expected = results()
    with cpu_tensors_on_triton():
        actual = results()
    return {name: (difference(t, expected[name]), 1e-10) for name, t in actual.items()}


def compare_norm(
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    *,
    rms: bool = False,
    bare: bool = False,
    shape: tuple[int, ...] = (2, 3, 5),
) -> Report:
    """Compare the residual addition and norm with PyTorch's; without update and bias if `bare`."""
    torch.manual_seed(0)
    x, update = (torch.randn(shape, dtype=F64).to(kind) for kind in (stream or dtype, dtype))
    weight, bias = torch.randn(2, shape[-1], dtype=F64).to(dtype)
    optional = [None if bare or rms else bias, 1e-5]
    inputs = [x, None if bare else update, weight, *optional]
    exact = [t.double() if isinstance(t, Tensor) else t for t in inputs]
    actual = add_norm(*inputs, rms=rms, backend="triton")
    expected = add_norm(*exact, rms=rms, backend="torch")
    assert [t.dtype for t in actual] == [x.dtype, dtype]
    return {
        name: (difference(t, e), TOLERANCE[t.dtype])
        for name, t, e in zip(("sum", "norm"), actual, expected, strict=True)
    }


def hooked_mixer() -> Report:
    """Count the calls of a hook on one direction, which the joint scan of both would skip."""
    mixer = VimMixer(8, state_dim=3).double()
    calls = []
    mixer.ahead.register_forward_hook(lambda *_: calls.append(1))
    with cpu_tensors_on_triton():
        mixer(torch.zeros(1, 8, 1, 2, dtype=F64))
    return {"calls": (abs(len(calls) - 1), 0)}


def check_operators() -> Report:
    """Run PyTorch's checks of custom operators, with and without the optional inputs."""
    both = [t.float().requires_grad_() for t in bidirectional_inputs(1, 3, 4, 2)]
    bare = [*both[:5], None, None, None]
    x, weight, bias = (t.float().requires_grad_() for t in conv_inputs(1, 3, 4))
    with warnings.catch_warnings():
        # The check itself reads the gradients of tensors that are no leaves.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor")
        torch.library.opcheck(torch.ops.lightspine.bidirectional_scan.default, (*both, True))
        torch.library.opcheck(torch.ops.lightspine.bidirectional_scan.default, (*bare, False))
        torch.library.opcheck(torch.ops.lightspine.causal_conv1d.default, (x, weight, bias, 0b10, True))
        torch.library.opcheck(torch.ops.lightspine.causal_conv1d.default, (x, weight, None, 0b01, False))
    return {"opcheck": (0.0, 0.0)}


def compiled_mixer() -> Report:
    """Compare Vim's mixer with itself under `torch.compile`, output and all gradients."""
    torch.manual_seed(0)
    mixer = VimMixer(4, state_dim=2)
    x = torch.randn(1, 4, 1, 3, requires_grad=True)
    results = []
    with cpu_tensors_on_triton():
        for run in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
            out = run(x)
            inputs = {"x": x, **dict(mixer.named_parameters())}
            grads = torch.autograd.grad(out.square().sum(), tuple(inputs.values()))
            results.append({"output": out, **dict(zip(inputs, grads, strict=True))})
    return {name: (difference(t, results[0][name].double()), 1e-6) for name, t in results[1].items()}


@contextmanager
def short_chunks(programs: int = 10**9, images: int = 10**9) -> Iterator[None]:
    """Split sequences into chunks of 4 steps, of 8 in the backward, as long ones are on a GPU.

    Args:
        programs: programs that are enough to fill the device; with 1 only the backward cuts, at 56 steps.
        images: images that the backward processes at once.
    """
    from lightspine.ops.triton import config, launch

    def choose(*sizes: Any, **options: Any) -> config.ScanConfig:
        return choose_config(*sizes, **options)._replace(images_per_slice=images)

    choose_config = launch.choose_config
    names = [
        (config, "CHUNK_UNIT", 4),
        (config, "STRETCH", 8),
        (launch, "STRETCH", 8),
        (config, "_ENOUGH_PROGRAMS", programs),
        (config, "_ENOUGH_GRAD_PROGRAMS", programs),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in names]
    for module, name, value in names:
        setattr(module, name, value)
    launch.choose_config = choose
    yield
    launch.choose_config = choose_config
    for module, name, value in before:
        setattr(module, name, value)


def compare(operator: Callable, inputs: Any, dtype: torch.dtype, **options: Any) -> Report:
    """Return the difference and the tolerance of every output and gradient."""
    inputs = convert(inputs, dtype)
    exact = type(inputs)(*(None if t is None else t.double() for t in inputs))
    actual = results_and_gradients(operator, inputs, backend="triton", **options)
    expected = results_and_gradients(operator, exact, backend="reference", **options)
    assert actual.keys() == expected.keys()
    return {
        name: (difference(t, expected[name]), max(TOLERANCE[t.dtype], TOLERANCE[dtype]))
        for name, t in actual.items()
    }


def difference(actual: Tensor, expected: Any) -> float:
    """Return the relative L2 difference, the norm where zeros are expected, infinity for a NaN."""
    expected = torch.as_tensor(expected, dtype=F64)
    if actual.numel() != expected.numel() or not actual.isfinite().all():
        return float("inf")
    return relative_l2(actual, expected) if expected.any() else float(actual.double().norm())


def without(inputs: Any, *names: str) -> Any:
    return inputs._replace(**dict.fromkeys(names))


def cut_scan(
    inputs: SelectiveScanInputs,
    dtype: torch.dtype,
    programs: int = 10**9,
    images: int = 10**9,
    **options: Any,
) -> Report:
    with short_chunks(programs, images):
        return compare(run_scan, inputs, dtype, delta_softplus=True, **options)


def cut_cross(dtype: torch.dtype, order: str = "cross2d", programs: int = 10**9, **sizes: int) -> Report:
    with short_chunks(programs):
        return compare(run_cross, cross_inputs(1, **sizes), dtype, order=order)


def figure(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> Report:
    """Compare with a case of `ops.json`, computed by the official code."""
    inputs, weights = figure_inputs(case)
    inputs = convert(inputs, dtype)
    leaves = type(inputs)(*(None if t is None else t.requires_grad_() for t in inputs))
    out, state = run_scan(leaves, delta_softplus=case["with_delta_bias_and_softplus"], backend="triton")
    (out * weights.to(dtype)).sum().backward()
    figures = {"output": (out, case["out"]), "last state": (state, case["last_state"])}
    figures |= {f"grad {name}": (getattr(leaves, name).grad, value) for name, value in case["grad"].items()}
    report = {}
    for name, (tensor, value) in figures.items():
        sampled = "values" not in value
        tensor = tensor.flatten()[:: value["sample_stride"]] if sampled else tensor
        report[name] = (difference(tensor, value["sample" if sampled else "values"]), tolerance)
    return report


def snake(height: int, width: int) -> Tensor:
    """Return a user-defined scan order: one direction, every second row reversed."""
    pixels = torch.arange(height * width).view(height, width)
    pixels[1::2] = pixels[1::2].flip(1)
    return pixels.view(1, -1)


def repeated(inputs: SelectiveScanInputs) -> Report:
    with short_chunks():
        first, second = (
            results_and_gradients(run_scan, inputs, delta_softplus=True, backend="triton") for _ in range(2)
        )
    return {name: (float((first[name] != second[name]).sum()), 0.0) for name in first}


def channels_last(inputs: SelectiveScanInputs) -> SelectiveScanInputs:
    """Return channels-last tokens and projections, as views of (B, L, D) like in a model."""
    both = torch.cat([inputs.B, inputs.C], 2).permute(0, 3, 1, 2).contiguous()
    B, C = both.permute(0, 2, 3, 1).chunk(2, dim=2)
    tokens = {
        name: getattr(inputs, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "delta")
    }
    return inputs._replace(B=B, C=C, **tokens)


FIGURES = {case["seed"]: case for case in read_figure("ops")["selective_scan"]}
# The interpreter takes about 5 ms per step and program, so the cases are tiny.
FAST_CASES: dict[str, Callable[[], Report]] = {
    "selective L1 N1": lambda: compare(run_scan, scan_inputs(1, 3, 1, 1, 1), F64, delta_softplus=True),
    "selective L2 N3": lambda: compare(run_scan, scan_inputs(1, 3, 2, 3, 1), F64, delta_softplus=True),
    "selective L5 N16": lambda: compare(run_scan, scan_inputs(1, 17, 5, 16, 1), F64, delta_softplus=True),
    "selective K2": lambda: cut_scan(scan_inputs(2, 6, 5, 2, 2), F64),
    "selective D70, three blocks of channels": lambda: cut_scan(scan_inputs(1, 70, 3, 1, 1), F64),
    "selective reverse": lambda: cut_scan(scan_inputs(1, 5, 7, 3, 1), F64, reverse=True),
    "selective in one chunk of three stretches": lambda: cut_scan(
        scan_inputs(1, 3, 19, 2, 1), F64, programs=1
    ),
    "selective in chunks of two stretches": lambda: cut_scan(scan_inputs(1, 3, 37, 2, 1), F64, programs=3),
    "selective in slices of one image": lambda: cut_scan(scan_inputs(3, 3, 5, 2, 1), F64, images=1),
    "selective without D": lambda: cut_scan(without(scan_inputs(1, 5, 5, 2, 1), "D"), F64),
    "selective without z": lambda: cut_scan(without(scan_inputs(1, 5, 5, 2, 1), "z"), F64),
    "selective without delta_bias": lambda: cut_scan(without(scan_inputs(1, 5, 5, 2, 1), "delta_bias"), F64),
    "selective bare, no softplus": lambda: compare(
        run_scan, without(scan_inputs(1, 5, 7, 2, 1), "D", "z", "delta_bias"), F64
    ),
    "selective channels innermost": lambda: cut_scan(channels_last(scan_inputs(1, 6, 5, 2, 2)), F64),
    **{
        f"selective {str(dtype)[6:]} N{states}": lambda dtype=dtype, states=states: cut_scan(
            scan_inputs(1, 24, 7, states, 1), dtype
        )
        for dtype, states in [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 1), (torch.float16, 3)]
    },
    "both directions": lambda: compare(run_both, bidirectional_inputs(), F64),
    "both directions in chunks": lambda: cut_both(bidirectional_inputs(1, 3, 9, 2)),
    "both directions without z": lambda: cut_both(without(bidirectional_inputs(1, 3, 5, 1), "z", "D")),
    "both directions bfloat16": lambda: cut_both(bidirectional_inputs(1, 5, 6, 3), torch.bfloat16),
    "mixer of Vim": vim_mixer,
    "mixer of Vim without recomputation": lambda: vim_mixer(recompute=False, divide_out=False),
    "mixer of Vim with a hook": hooked_mixer,
    "optimized mixer of Vim": lambda: vim_mixer(optimized=True, layer_scale=0.5),
    "operators of Vim pass opcheck": check_operators,
    "compiled mixer of Vim": compiled_mixer,
    "convolution": lambda: compare_conv(F64),
    "convolution of one position": lambda: compare_conv(F64, batch=1, length=1),
    "convolution over two tiles": lambda: compare_conv(F64, dim=65, length=33, width=3),
    "convolution without SiLU or bias": lambda: compare(
        run_conv, without(conv_inputs(groups=1), "bias"), F64, reverse=(True,)
    ),
    "convolution bfloat16": lambda: compare_conv(torch.bfloat16, reverse=(False,)),
    "norm after an addition": lambda: compare_norm(F64),
    "norm alone": lambda: compare_norm(F64, bare=True),
    "norm of more rows than a program has": lambda: compare_norm(F64, shape=(130, 17)),
    "norm of one channel": lambda: compare_norm(F64, rms=True, shape=(3, 1)),
    "RMS norm of a float32 stream": lambda: compare_norm(torch.bfloat16, torch.float32, rms=True),
    "norm of a float32 map in bfloat16": lambda: compare_norm(torch.bfloat16, torch.float32, bare=True),
    "map cross2d": lambda: cut_cross(F64, height=2, width=3, dim=3),
    "map in a user's own order": lambda: cut_cross(F64, "snake", height=3, width=5, groups=1, dim=17),
    "selective, empty batch": lambda: compare(run_scan, scan_inputs(0, 3, 5, 2, 1), F64, delta_softplus=True),
    "both directions, empty batch": lambda: compare(run_both, bidirectional_inputs(0), F64),
    "convolution of an empty batch": lambda: compare_conv(F64, batch=0),
    "map of an empty batch": lambda: compare(run_cross, cross_inputs(0), F64),
    "map of one pixel": lambda: compare(run_cross, cross_inputs(1, 1, 1, 3, 3), F64),
    "map bfloat16": lambda: compare(run_cross, cross_inputs(1, 2, 3, 5, 3), torch.bfloat16),
    "official figures, seed 101": lambda: figure(FIGURES[101], torch.float32, 5e-6),
}
SLOW_CASES: dict[str, Callable[[], Report]] = {
    "selective L63 N1": lambda: compare(run_scan, scan_inputs(1, 3, 63, 1, 1), F64, delta_softplus=True),
    "selective L35 N16": lambda: compare(run_scan, scan_inputs(1, 5, 35, 16, 1), F64, delta_softplus=True),
    "selective L31 N33 D40": lambda: cut_scan(scan_inputs(1, 40, 31, 33, 1), F64),
    "selective L33 N3 D96": lambda: compare(run_scan, scan_inputs(1, 96, 33, 3, 1), F64, delta_softplus=True),
    "selective L33 N16 D100": lambda: compare(
        run_scan, scan_inputs(1, 100, 33, 16, 1), F64, delta_softplus=True
    ),
    "selective L197 N3 D1": lambda: compare(run_scan, scan_inputs(1, 1, 197, 3, 1), F64, delta_softplus=True),
    "both directions L197": lambda: compare(run_both, bidirectional_inputs(1, 2, 197, 2), F64),
    "selective K4": lambda: cut_scan(scan_inputs(2, 12, 9, 3, 4), F64),
    "selective is deterministic": lambda: repeated(scan_inputs(2, 40, 7, 2, 2)),
    "map N1, one chunk": lambda: cut_cross(F64, programs=1, height=3, width=5, dim=3, state_dim=1),
    **{
        f"map {order} {str(dtype)[6:]}": lambda order=order, dtype=dtype: cut_cross(
            dtype, order, height=3, width=5, dim=7
        )
        for order, dtype in [
            ("cross2d", torch.float32),
            ("cross2d", torch.bfloat16),
            ("cross2d", torch.float16),
            ("unidirectional", F64),
            ("bidirectional", F64),
        ]
    },
    **{
        f"official figures, seed {seed}, float64": lambda case=case: figure(case, F64, 1e-10)
        for seed, case in FIGURES.items()
    },
}


def convert_scalars_of_newer_numpy() -> None:
    """Let the interpreter of Triton 3.6 count with NumPy 2.5, which converts no array to a number."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def main() -> None:
    """Run one table of cases, "fast" or "slow", and print the report."""
    convert_scalars_of_newer_numpy()
    # Uninitialized memory is NaN, as in the tests of the other backends.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    register_scan_order("snake", snake)
    cases = {"fast": FAST_CASES, "slow": SLOW_CASES}[sys.argv[1]]
    chosen = sys.argv[2:] or list(cases)
    sys.stdout.write(json.dumps({name: cases[name]() for name in chosen}))


if __name__ == "__main__":
    main()
