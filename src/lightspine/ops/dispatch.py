"""Choice of the scan backend by the device of the tensors, never by what happens to be installed."""

import functools
import importlib.util
import os
from typing import Any

import torch
import torch.fx

from lightspine.errors import UsageError
from lightspine.ops.derivatives import in_transform

BACKENDS = ("reference", "torch", "cpu", "triton")
# Devices without kernels of their own run standard PyTorch operations.
_KERNELS_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# torch.compile calls it while tracing, instead of tracing through the cache.
@torch.compiler.assume_constant_result
def choose_backend(
    device_type: str, dtype: torch.dtype, exporting: bool = False, requested: str = "auto"
) -> str:
    """Return the name of the backend that computes a scan.

    Args:
        device_type: `tensor.device.type` of the input.
        dtype: dtype of the input.
        exporting: the call is traced into a format without custom operators, such as ONNX.
        requested: name of a backend, or "auto" for the one of the device.

    Raises:
        UsageError: an unsupported dtype, an unknown backend, or a backend that cannot run here.
    """
    return _choose_backend(device_type, dtype, exporting, requested)


# Cached: looking for installed packages takes tens of microseconds. What is installed, and whether Triton
# interprets its kernels, does not change while a process runs.
@functools.cache
def _choose_backend(device_type: str, dtype: torch.dtype, exporting: bool, requested: str) -> str:
    if dtype not in _DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise UsageError(
            f"a scan takes inputs of dtype {expected}, received {str(dtype).removeprefix('torch.')}"
        )
    if requested == "auto":
        name = "torch" if exporting else _KERNELS_BY_DEVICE.get(device_type, "torch")
        if name == "triton" and not _is_installed("triton"):
            # No silent fall-back to something many times slower.
            raise UsageError(
                "a scan of CUDA tensors runs on the backend 'triton', but triton is not installed: "
                "install it, or pass backend='torch'"
            )
        return name
    if requested not in BACKENDS:
        raise UsageError(f"unknown scan backend {requested!r}: expected auto, {', '.join(BACKENDS)}")
    can_run, reason = available_backends()[requested]
    if not can_run:
        raise UsageError(f"the scan backend {requested!r} cannot run here: {reason}")
    if requested in _KERNELS_BY_DEVICE.values():
        interpreted = requested == "triton" and device_type == "cpu" and triton_is_interpreted()
        if _KERNELS_BY_DEVICE.get(device_type) != requested and not interpreted:
            raise UsageError(
                f"the scan backend {requested!r} cannot run here: its tensors are on {device_type}"
            )
        if exporting:
            raise UsageError(
                f"the scan backend {requested!r} cannot run here: the exported format has no kernels"
            )
    return requested


# Called while tracing, because torch.compile of PyTorch 2.11 takes the result of PyTorch's function as true.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return whether `torch.export` traces the caller; `torch.compile` does not count."""
    return torch.compiler.is_exporting()


def runs_on_triton(x: Any) -> bool:
    """Return whether a scan of a tensor runs on the Triton kernels by default.

    `False` while exporting and under transforms (`lightspine.ops.derivatives.in_transform`).
    """
    if isinstance(x, torch.fx.Proxy) or is_exporting() or torch.onnx.is_in_onnx_export():
        return False
    if in_transform():
        return False
    return _KERNELS_BY_DEVICE.get(x.device.type) == "triton"


@functools.cache
def load_backend(name: str) -> Any:
    """Import a backend and return the object with its forward and backward functions.

    Raises:
        UsageError: the backend "reference", which is differentiated by autograd and has no backward function.
    """
    if name == "reference":
        raise UsageError(
            "the scan operators run the backends torch, cpu and triton, received 'reference': "
            "call lightspine.ops.selective_scan or lightspine.ops.cross_scan with it"
        )
    if name == "torch":
        from lightspine.ops import torch_scan

        return torch_scan
    from lightspine.ops.kernel_scan import KernelScan

    # Imported on first use: numba takes half a second.
    return KernelScan(importlib.import_module(f"lightspine.ops.{name}.launch"))


def runs_on_cpu_kernels(device_type: str, requested: str) -> bool:
    """Return whether a scan runs on the CPU kernels.

    Their forward saves states for the backward, and their results have the memory layout of the inputs.
    """
    return device_type == "cpu" and requested in ("auto", "cpu")


def available_backends() -> dict[str, tuple[bool, str]]:
    """Return for every backend whether it can run on this machine, and on which tensors or why not."""
    has_numba = _is_installed("numba")
    return {
        "reference": (True, "any device; the plain loop that defines the operator"),
        "torch": (True, "any device; blocked scan in standard PyTorch operations"),
        "cpu": (
            has_numba,
            "CPU tensors; kernels compiled by numba" if has_numba else "numba is not installed",
        ),
        "triton": _triton_availability(),
    }


def cpu_thread_source() -> str:
    """Return which threads the backend "cpu" runs on, for `lightspine doctor`."""
    if not _is_installed("numba"):
        return "none: numba is not installed"
    from lightspine.ops.cpu.parallel import thread_source

    return thread_source()


def triton_is_interpreted() -> bool:
    """Return whether Triton runs its kernels in Python on a CPU, for tests: TRITON_INTERPRET is set.

    Triton reads the variable when it first sees a kernel, so set it before Python starts.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _triton_availability() -> tuple[bool, str]:
    if not _is_installed("triton"):
        return False, "triton is not installed"
    if triton_is_interpreted():
        return True, "CPU and CUDA tensors, step by step in Triton's interpreter (TRITON_INTERPRET is set)"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    return True, "CUDA tensors; kernels compiled by triton"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
