"""All-gather per-image results across ranks."""

from typing import TypeVar

import torch.distributed as dist

Key = TypeVar("Key")
Value = TypeVar("Value")


def all_gather_by_image(results: dict[Key, Value]) -> dict[Key, Value]:
    """Return the results of all processes; every process gets them.

    Processes that cannot share the images evenly do a few of them twice: such an image counts once, with the
    result of the lowest rank. Without a process group these are the results themselves.

    Args:
        results: image -> what was found in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return results
    parts: list[dict[Key, Value]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, results)
    return {key: value for part in reversed(parts) for key, value in part.items()}
