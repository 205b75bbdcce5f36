"""Model arguments in a file of somebody else: no other file, no address, no size that its tensors lack."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lightspine
from lightspine.dense import create_detector, load_network
from lightspine.dense.checkpoint import save_network
from lightspine.errors import LightspineError
from lightspine.models.checkpoint import NETWORK_KEY, read_checkpoint
from lightspine.models.saving import write_safetensors

SMALL: dict[str, Any] = {"embed_dims": (8, 16, 24), "depths": (1, 1, 1), "partial_dims": (4, 8, 8)}


def write(path: Path, arguments: Any) -> Path:
    """Save a small model with other arguments than its own."""
    model = lightspine.create_model("shvit_s1", num_classes=3, **SMALL)
    strings = {"lightspine.model": "shvit_s1", "lightspine.kwargs": json.dumps(arguments)}
    return write_safetensors(model, path / "model.safetensors", strings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:1/a.pth"}},
            "pretrained_cfg_overlay names another file",
        ),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "names another file"),
        ({"checkpoint": "/etc/passwd"}, "model argument checkpoint names another file"),
        ({"cache_dir": "/tmp"}, "names another file"),
        ({"depths": [10**9, 1, 1]}, "model argument depths is 1000000002, which its"),
        ({"depths": [4000, 4000, 4000]}, "model argument depths is 12000, which its"),
        ({"num_classes": 10**9}, "model argument num_classes is 1000000000, which its"),
        ({"embed_dims": [4096, 4096, 4096]}, "describe .* numbers, its tensors have"),
        ([1, 2], "its model arguments are no object"),
        ({"depths": "many"}, "stores wrong model arguments"),
        ({"embed_dims": [-1, 16, 24]}, "stores wrong model arguments"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_that_the_tensors_do_not_confirm_are_refused(
    tmp_path: Path, arguments: Any, message: str
) -> None:
    with pytest.raises(LightspineError, match=message):
        lightspine.load_model(write(tmp_path, arguments))


def test_own_arguments_are_accepted(tmp_path: Path) -> None:
    model, _ = lightspine.load_model(write(tmp_path, SMALL | {"num_classes": 3}))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_old_file_of_a_model_that_was_created_pretrained_downloads_nothing(tmp_path: Path) -> None:
    _, metadata = lightspine.load_model(write(tmp_path, SMALL | {"num_classes": 3, "pretrained": True}))
    assert "pretrained" not in metadata.kwargs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 10**9}, "model argument num_classes is 1000000000"),
        ({"options": {"model_args": {"checkpoint": "/etc/passwd"}}}, "names another file"),
        ({"options": {"channels": 10**7}}, "model argument channels is 10000000"),
        ({"options": {"model_args": 3}}, "stores wrong model arguments"),
    ],
    ids=str,
)
def test_arguments_of_a_detector_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    detector = create_detector("retinanet", "shvit_s1", 2, model_args=dict(SMALL), channels=16)
    path = save_network(detector, tmp_path / "detector.safetensors")
    description = json.loads(read_checkpoint(path).metadata[NETWORK_KEY]) | changes
    write_safetensors(detector, path, {NETWORK_KEY: json.dumps(description)})
    with pytest.raises(LightspineError, match=message):
        load_network(path)
