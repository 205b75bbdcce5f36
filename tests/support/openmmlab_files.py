"""Checkpoint files in OpenMMLab's layout, filled as those that the reference values were computed with."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.fill import fill_tensor, make_images
from support.reference import read_figure

MEAN = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64) / 255
STD = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64) / 255


def fill_openmmlab(figure: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a figure: published key -> float32 tensor."""
    return {key: _fill(key, shape, figure["fill"]["rules"]) for key, shape in figure["checkpoint"].items()}


def _fill(key: str, shape: list[int], rules: list[dict[str, Any]]) -> Tensor:
    rule = next((rule for rule in rules if re.search(rule["key"], key)), {})
    value = fill_tensor(key, tuple(shape), rule.get("gain", 1.0))
    if "index" in rule:
        value[rule["index"]] += np.float32(rule["add"])
    elif "add" in rule:
        value = (value + np.float32(rule["add"])).astype(np.float32)
    return torch.from_numpy(np.asarray(value))


def write_openmmlab(name: str, folder: Path, meta: dict[str, Any] | None = None) -> Path:
    """Write the checkpoint of `fixtures/reference/dense/{name}.json` as mmengine does."""
    path = folder / f"{name}.pth"
    torch.save(
        {"meta": meta or {"epoch": 12}, "state_dict": fill_openmmlab(read_figure(f"dense/{name}"))}, path
    )
    return path


def case_images(case: dict[str, Any]) -> Tensor:
    """Return the normalized float64 images of a case."""
    spec = case["input"]
    images = make_images(spec["batch"], spec["height"], spec["width"], spec["seed"])
    return torch.from_numpy(images).double()


def denormalize(images: Tensor) -> Tensor:
    """Undo the normalization of images (B, 3, H, W), for detectors, which normalize their input."""
    return images * STD[:, None, None] + MEAN[:, None, None]
