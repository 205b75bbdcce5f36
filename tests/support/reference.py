"""Reference values of the official code, and the checkpoints that they were computed with."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightspine
from support.fill import fill_tensor, make_images

FIGURES = Path(__file__).parents[1] / "fixtures" / "reference"


def read_figure(name: str) -> dict[str, Any]:
    """Read `fixtures/reference/{name}.json`, such as "vim/vim_tiny"."""
    return json.loads((FIGURES / f"{name}.json").read_text())


def fill_checkpoint(layout: dict[str, list[int]], gain: float = 1.0) -> dict[str, Tensor]:
    """Return the state dict in the published layout: key -> filled float32 tensor (int64 counters)."""
    return {key: torch.from_numpy(fill_tensor(key, tuple(shape), gain)) for key, shape in layout.items()}


def write_official_file(path: Path, state_dict: dict[str, Tensor], entry: str = "model") -> Path:
    """Save a state dict as the official repositories do: inside a dict, under `entry`."""
    torch.save({entry: state_dict, "epoch": 299}, path)
    return path


def load_figure_model(name: str, figure: dict[str, Any], folder: Path, **options: Any) -> nn.Module:
    """Create a model from the reference checkpoint, saved as an official file."""
    state_dict = fill_checkpoint(figure["checkpoint"], figure["gain"])
    path = write_official_file(folder / "official.pth", state_dict)
    return lightspine.create_model(name, checkpoint=path, **options).eval()


def figure_images(figure: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the input images of the reference values (or of their "training" part)."""
    spec = figure["input"]
    images = make_images(spec["batch"], spec["height"], spec["width"], spec["seed"])
    return torch.from_numpy(images).to(dtype)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in float64."""
    actual, expected = actual.detach().double().flatten(), expected.detach().double().flatten()
    return float((actual - expected).norm() / expected.norm())


def assert_close(name: str, actual: Tensor, expected: Any, tolerance: float) -> None:
    """Fail with the tensor's name when the relative L2 difference exceeds the tolerance."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.numel() == expected.numel(), (
        f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    )
    assert torch.isfinite(actual).all(), f"{name} has non-finite values"
    difference = relative_l2(actual, expected)
    assert difference <= tolerance, f"{name}: relative L2 difference {difference:.2e} > {tolerance:.0e}"
