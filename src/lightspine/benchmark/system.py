"""Description of the system of a measurement: processor, devices, threads, package versions."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightspine.utils.allocation import keeps_freed_memory

_PACKAGES = (
    "lightspine",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "numba",
    "triton",
    "safetensors",
    "lightning",
    "jsonargparse",
    "torchmetrics",
    "rich",
    "matplotlib",
    "scikit-learn",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def describe_system() -> dict[str, Any]:
    """Return date, processor, threads, devices and package versions as plain values for JSON.

    Versions come from the installed metadata, so no package is imported. A package that is not installed has
    the version `None`. The load average is that of the last minute, `None` where the system has none.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "processors_usable": usable_processors(),
        "load_average": load_average(),
        "torch_threads": torch.get_num_threads(),
        "freed_memory": "kept" if keeps_freed_memory() else "handed back",
        "devices": _devices(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Return the load average of the last minute, or None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def usable_processors() -> int:
    """Return the number of processors that this process may use."""
    # A container or taskset may grant fewer processors than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[str]:
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {properties.name}, {properties.total_memory // 2**20} MiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices
