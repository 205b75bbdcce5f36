"""Which backend computes a scan: a table over the tensor's device, never over what is installed."""

import importlib.util
import os

import torch

from lightspine.errors import UsageError

BACKENDS = ("reference", "torch", "cpu", "triton")
# Any other device has no kernels of its own and takes the standard operations.
_KERNELS_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose_backend(
    device_type: str, dtype: torch.dtype, exporting: bool = False, requested: str = "auto"
) -> str:
    """Return the name of the backend that computes a scan.

    Args:
        device_type: `tensor.device.type` of the input.
        dtype: dtype of the input.
        exporting: the call is being written into a format that knows no operator of ours, such as ONNX.
        requested: what the caller asked for; "auto" leaves the choice to this table.

    Raises:
        UsageError: a dtype that no backend takes, an unknown name, or a backend that cannot run here.
    """
    if dtype not in _DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise UsageError(
            f"a scan takes inputs of dtype {expected}, received {str(dtype).removeprefix('torch.')}"
        )
    if requested == "auto":
        name = "torch" if exporting else _KERNELS_BY_DEVICE.get(device_type, "torch")
        if name == "triton" and not _installed("triton"):
            # No silent fall-back to something many times slower.
            raise UsageError(
                "a scan of CUDA tensors runs on the backend 'triton', but triton is not installed: "
                "install it, or ask for backend='torch'"
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
                f"the scan backend {requested!r} cannot run here: its tensors lie on {device_type}"
            )
        if exporting:
            raise UsageError(
                f"the scan backend {requested!r} cannot run here: the exported format has no kernels"
            )
    return requested


def keeps_states(device_type: str, requested: str) -> bool:
    """Return whether the backend of a scan notes states in the forward for its backward."""
    return device_type == "cpu" and requested in ("auto", "cpu")


def available_backends() -> dict[str, tuple[bool, str]]:
    """Return, for every backend, whether it can run on this machine and on what, or why it cannot."""
    has_numba = _installed("numba")
    return {
        "reference": (True, "any device; the plain loop that defines the operator"),
        "torch": (True, "any device; blocked scan in standard PyTorch operations"),
        "cpu": (
            has_numba,
            "CPU tensors; kernels compiled by numba" if has_numba else "numba is not installed",
        ),
        "triton": _triton(),
    }


def cpu_thread_source() -> str:
    """Return whose threads the backend "cpu" runs on."""
    if not _installed("numba"):
        return "none: numba is not installed"
    from lightspine.ops.cpu.parallel import thread_source

    return thread_source()


def triton_is_interpreted() -> bool:
    """Return whether Triton runs its kernels in Python, on a CPU, to test them: TRITON_INTERPRET is set.

    Triton reads the variable when it first sees a kernel; so it is set before Python starts.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _triton() -> tuple[bool, str]:
    if not _installed("triton"):
        return False, "triton is not installed"
    if triton_is_interpreted():
        return True, "CPU and CUDA tensors, step by step in Triton's interpreter (TRITON_INTERPRET is set)"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    return True, "CUDA tensors; kernels compiled by triton"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
