"""Compare a hierarchical model family with official reference values through the public API."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightspine.models import get_record
from support.reference import assert_close, figure_images, load_figure_model, read_figure


@dataclass
class FigureRun:
    """Reference values, the float64 model loaded from their checkpoint, and its outputs."""

    figure: dict[str, Any]
    model: nn.Module
    logits: Tensor
    maps: dict[str, Tensor]


def run_figure(figure_name: str, model_name: str, folder: Path) -> FigureRun:
    """Load the reference checkpoint as an official file and run its images in float64."""
    figure = read_figure(figure_name)
    model = load_figure_model(model_name, figure, folder).double()
    images = figure_images(figure)
    with torch.inference_mode():
        stages = model.forward_intermediates(images, intermediates_only=True)
        maps = {"stem": model.stem(images)} | {f"stage{i}": x for i, x in enumerate(stages, 1)}
        return FigureRun(figure, model, model(images), maps)


def assert_map(name: str, actual: Tensor, expected: dict[str, Any], tolerance: float = 1e-8) -> None:
    """Compare a map with its recorded shape, sampled values of the first image, and moments."""
    assert list(actual.shape) == expected["shape"], name
    sampled = actual[0].flatten()[expected["flat_indices"]]
    assert_close(f"{name} values", sampled, expected["values"], tolerance)
    moments = torch.stack([actual.mean(), actual.std(correction=0)])
    assert_close(f"{name} moments", moments, [expected["mean"], expected["std"]], tolerance)


def official_names(model_name: str, model: nn.Module, layout: dict[str, list[int]]) -> dict[str, str]:
    """Return published key -> our key of every tensor."""
    published = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
    renamed = get_record(model_name).checkpoint_filter_fn(dict(published), model)
    ours = {id(tensor): key for key, tensor in renamed.items()}
    return {key: ours[id(tensor)] for key, tensor in published.items() if id(tensor) in ours}


def assert_training_step(model_name: str, model: nn.Module, figure: dict[str, Any]) -> None:
    """Compare loss, logits, gradients and batch-norm buffers of one float64 training step."""
    training = figure["training"]
    model = model.double().train()
    logits = model(figure_images(training))
    loss = F.cross_entropy(logits, torch.tensor(training["targets"]))
    loss.backward()
    assert_close("loss", loss, training["loss"], 1e-8)
    assert_close("logits", logits[:, :4], training["logits_first4"], 1e-7)
    names = official_names(model_name, model, figure["checkpoint"])
    for key, expected in training["gradients"].items():
        gradient = model.get_parameter(names[key]).grad
        assert list(gradient.shape) == expected["shape"], key
        assert_close(f"{key} gradient", gradient.flatten()[:4], expected["first"], 1e-6)
        assert_close(f"{key} gradient norm", gradient.norm(), expected["l2"], 1e-6)
    for key, expected in training.get("batch_norm_buffers_after_one_forward", {}).items():
        assert_close(key, model.get_buffer(names[key])[:4], expected, 1e-7)
