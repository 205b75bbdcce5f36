"""Head redundancy: similarity of attention heads and accuracy without one of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightspine
from lightspine.analysis import open_model, redundancy
from lightspine.analysis.head_redundancy import run_without_head
from lightspine.data import list_images
from lightspine.errors import UsageError
from support.images import write_folder, write_image


def transformer() -> nn.Module:
    return lightspine.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "a.png", (9, 99, 200), size=(80, 80))


def test_equal_heads_have_cosine_one_and_others_less(image: Path) -> None:
    model = transformer()
    qkv = model.blocks[0].attn.qkv
    with torch.no_grad():
        qkv.weight.normal_(std=0.3)
        # Head 1 gets the queries and keys of head 0; head 2 stays different.
        for start in (0, 192):
            qkv.weight[start + 64 : start + 128] = qkv.weight[start : start + 64]
            qkv.bias[start + 64 : start + 128] = qkv.bias[start : start + 64]
    result = redundancy(open_model(model), [image])
    matrix = result.similarity[0]
    np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-9)
    assert matrix[0, 1] == pytest.approx(1)
    assert matrix[0, 2] < 0.999


def test_model_without_a_head_equals_one_whose_projection_ignores_it() -> None:
    model, pixels = transformer(), torch.randn(2, 3, 64, 64)
    handle = open_model(model)
    got = run_without_head(handle, pixels, "blocks.1.attn", 2)
    with torch.no_grad():
        whole = model(pixels)
        model.blocks[1].attn.proj.weight[:, 128:192] = 0
        torch.testing.assert_close(got, model(pixels))
    assert not torch.allclose(got, whole)


def test_changes_are_scores_without_each_head_minus_the_whole_score(tmp_path: Path) -> None:
    model = transformer()
    handle = open_model(model)
    _, labelled = list_images(write_folder(tmp_path, count=3))
    result = redundancy(handle, [labelled[0].path], labelled=labelled)
    assert result.labelled == 9
    assert [len(change) for change in result.changes] == [3, 3]
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, :64] = 0
    without = redundancy(handle, [labelled[0].path], labelled=labelled)
    assert without.top1 == pytest.approx(result.top1 + result.changes[0][0])


def test_maps_tell_what_heads_read_on_average(image: Path) -> None:
    result = redundancy(open_model("efficientmod_xxs", size=(64, 128)), [image])
    assert result.maps[0].shape == (8, 4, 8)
    np.testing.assert_allclose(result.maps[0].sum((1, 2)), 1, rtol=1e-4)
    assert all(heads.shape[1:] > (1, 1) for heads in result.maps)


def test_layers_of_a_single_token_are_left_out(image: Path) -> None:
    result = redundancy(open_model("efficientmod_xxs", size=32), [image])
    assert all(name.startswith("stages.2") for name in result.modules)


def test_model_with_one_head_is_refused(image: Path) -> None:
    with pytest.raises(UsageError, match="shvit_s1 has no multi-head attention"):
        redundancy(open_model("shvit_s1", size=64), [image])


def test_no_image_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one image"):
        redundancy(open_model("efficientmod_xxs", size=64), [])
