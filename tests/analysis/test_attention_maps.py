"""Attention maps of one query: values, positions, and errors for models without attention."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import lightspine
from lightspine.analysis import AttentionResult, ClassPathResult, attention, open_model
from lightspine.analysis.attention_weights import softmax_rows
from lightspine.analysis.op_recorder import record_calls
from lightspine.analysis.stages import token_grid
from lightspine.errors import UsageError
from support.images import write_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "a.png", (9, 99, 200), size=(150, 120))


def small(name: str) -> nn.Module:
    sizes = {
        "vmamba_tiny": {"depths": [1, 1], "embed_dims": [8, 16]},
        "vim_tiny": {"depth": 2, "dim": 16, "stride": 8},
        "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    }
    return lightspine.create_model(name, num_classes=3, **sizes.get(name, {})).eval()


def first_attention(model: nn.Module, query: tuple[int, int], image: Path, **more: object) -> AttentionResult:
    (result,) = attention(open_model(model, **more), [image], query=query)
    assert isinstance(result, AttentionResult)
    return result


def test_attention_of_shvit_reproduces_the_layers_values() -> None:
    calls = record_calls(small("shvit_s1"), torch.randn(1, 3, 128, 192))
    rows = softmax_rows(calls[0])
    torch.testing.assert_close(rows[0] @ calls[0].args[2][0], calls[0].output[0], rtol=1e-4, atol=1e-5)


def test_attention_of_a_timm_transformer_equals_its_own_softmax() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    pixels, kept = torch.randn(1, 3, 64, 64), []
    rows = softmax_rows(record_calls(model, pixels)[0], torch.tensor([3, 16]))
    model.blocks[0].attn.fused_attn = False
    model.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(pixels)
    torch.testing.assert_close(rows, kept[0][0][:, [3, 16]])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_attention_equals_pytorchs(kind: str) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.tril(torch.ones(5, 5)).bool()
            chosen = mask if kind == "bool" else torch.arange(25.0).view(5, 5)
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=chosen, scale=0.3)

    (call,) = record_calls(Masked(), torch.randn(1, 2, 5, 4))
    torch.testing.assert_close(softmax_rows(call) @ call.args[2][0], call.output[0])


@pytest.mark.parametrize("name", ["vmamba_tiny", "vim_tiny", "shvit_s1", "efficientmod_xxs"])
def test_maps_of_odd_sizes_cover_the_image_and_sum_to_one(name: str, image: Path) -> None:
    result = first_attention(small(name), (0, 90), image, size=(97, 161))
    rows, columns = result.reads.shape[1:]
    assert result.cell == (0, 90 * columns // 161)
    assert rows < columns
    assert len(result.labels) == len(result.reads)
    np.testing.assert_allclose(result.reads[-1].sum(), 1, rtol=1e-4)


def test_scan_of_vim_reads_the_query_past_its_class_token(image: Path) -> None:
    result = first_attention(small("vim_tiny"), (60, 60), image, size=64)
    assert result.labels == ["ahead", "back", "merged"]
    row, column = result.cell
    # The forward scan meets the query last, so it reads no later position; the backward scan likewise.
    flat = result.reads.reshape(3, -1)
    place = row * result.reads.shape[2] + column
    assert not flat[0, place + 1 :].any()
    assert not flat[1, :place].any()
    assert flat[2, place] > 0


def test_readers_are_where_the_query_is_read(image: Path) -> None:
    result = first_attention(small("vmamba_tiny"), (30, 30), image, size=64)
    assert result.readers is not None
    place = result.cell[0] * result.readers.shape[2] + result.cell[1]
    assert not result.readers[0].reshape(-1)[:place].any()
    assert result.labels[0] == "rows, ahead"


@pytest.mark.parametrize("name", ["vim_tiny", "vit_tiny_patch16_224"])
def test_class_path_gives_each_layers_shares(name: str, image: Path) -> None:
    (result,) = attention(open_model(small(name), size=64), [image], query="class")
    assert isinstance(result, ClassPathResult)
    assert len(result.modules) == 2
    np.testing.assert_allclose(result.reads.sum((1, 2)) + result.kept, 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("shvit_s1", {"query": (64, 0)}, "query Y,X from 0,0 to 63,63 .* got 64,0"),
        ("shvit_s1", {"query": "class"}, "shvit_s1 has no class token: expected a query Y,X"),
        ("shvit_s1", {"stage": 0}, "stage 0 of shvit_s1 has no attention, expected one of 1, 2"),
        ("shvit_s1", {"stage": 7}, "expected a stage among 0, 1, 2, got 7"),
        ("vim_tiny", {"query": "class", "stage": 1}, "expected no stage with the query 'class'"),
        ("resnet10t", {}, "resnet10t has neither selective scans nor calls of scaled_dot_product_attention"),
        ("efficientvim_m1", {}, "importance EfficientViM"),
    ],
)
def test_wrong_question_is_one_sentence(name: str, more: dict, message: str, image: Path) -> None:
    with pytest.raises(UsageError, match=message):
        attention(open_model(small(name), size=64), [image], **more)


def test_windows_are_refused() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    (call,) = record_calls(Windows(), torch.randn(4, 2, 9, 8))
    with pytest.raises(UsageError, match="expected attention over a whole image, got 4 windows"):
        softmax_rows(call)


@pytest.mark.parametrize(
    ("size", "grid"), [((97, 161), (6, 10)), ((224, 224), (14, 14)), ((40, 200), (2, 12))]
)
def test_tokens_are_laid_out_by_the_ratio_of_the_image(size: tuple[int, int], grid: tuple[int, int]) -> None:
    found = token_grid(nn.Identity(), grid[0] * grid[1], size)
    assert (found.height, found.width) == grid


def test_tokens_that_form_no_grid_are_refused() -> None:
    with pytest.raises(UsageError, match="97 tokens do not form a grid with the aspect ratio of 224x224 px"):
        token_grid(nn.Identity(), 97, (224, 224))
