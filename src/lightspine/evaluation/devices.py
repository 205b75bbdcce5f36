"""torch's devices: whether one is there, and waiting for it."""

import torch

from lightspine.errors import UsageError


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UsageError: no such device.
    """
    try:
        # The shortest use there is: what is available is told differently by every kind of device.
        torch.empty(0, device=device)
    # torch raises an AssertionError where it was built without the device.
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
