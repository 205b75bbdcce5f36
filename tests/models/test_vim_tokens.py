"""Vim's class token position and position embedding interpolation."""

import pytest
import torch

from lightspine.errors import LightspineError
from lightspine.models.vim import class_tokens_of, join_tokens, patches_of, resize_pos_embed, square_grid
from support.fill import fill_tensor
from support.reference import assert_close, read_figure

ROWS = {"middle": [2], "head": [0], "double": [0, 6], "none": []}


@pytest.mark.parametrize("class_token", ROWS)
def test_class_token_stands_where_published(class_token: str) -> None:
    rows = ROWS[class_token]
    patches = torch.arange(5.0).view(1, 5, 1)
    sequence = join_tokens(patches, -torch.ones(1, len(rows), 1), class_token)
    assert (sequence.flatten() < 0).nonzero().flatten().tolist() == rows


@pytest.mark.parametrize("patches", [1, 4, 5, 196])
@pytest.mark.parametrize("class_token", ROWS)
def test_sequence_comes_apart_as_it_was_joined(class_token: str, patches: int) -> None:
    x, tokens = torch.randn(2, patches, 3), torch.randn(2, len(ROWS[class_token]), 3)
    sequence = join_tokens(x, tokens, class_token)
    assert torch.equal(patches_of(sequence, class_token), x)
    assert torch.equal(class_tokens_of(sequence, class_token), tokens)


@pytest.mark.parametrize("class_token", ROWS)
def test_resized_table_keeps_its_class_rows(class_token: str) -> None:
    table = torch.randn(1, 16 + len(ROWS[class_token]), 3)
    resized = resize_pos_embed(table, (4, 4), (3, 7), class_token)
    assert resized.shape[1] == 21 + len(ROWS[class_token])
    assert torch.equal(class_tokens_of(resized, class_token), class_tokens_of(table, class_token))


def test_resized_table_keeps_the_picture_of_the_map() -> None:
    columns = torch.arange(6.0).repeat(4).view(1, 24, 1)
    table = join_tokens(columns, torch.full((1, 1, 1), 99.0), "middle")
    resized = patches_of(resize_pos_embed(table, (4, 6), (8, 12), "middle"), "middle").view(8, 12)
    assert torch.allclose(resized, resized[:1].expand(8, 12), atol=1e-5)
    assert (resized[0].diff() > 0).all()


def test_table_of_the_right_size_is_left_as_it_is() -> None:
    table = torch.randn(1, 13, 3)
    assert resize_pos_embed(table, (3, 4), (3, 4), "middle") is table


def test_resizing_as_if_the_token_led_equals_the_official_fine_tuning_script() -> None:
    figure = read_figure("vim/vim_pos_embed")
    table = torch.from_numpy(fill_tensor("pos_embed", (1, 197, 192))).double()
    resized = resize_pos_embed(table, (14, 14), (27, 27), "head")[0]
    assert list(resized.shape) == figure["out"]["shape"]
    for row in (0, 1, 364, 729):
        assert_close(f"row {row}", resized[row, :4], figure[f"row{row}_first4"], 5e-8)
    assert_close("std", resized.std(correction=0), figure["out"]["std"], 1e-7)


def test_table_of_no_square_is_refused() -> None:
    with pytest.raises(LightspineError, match="received 20 patches"):
        square_grid(21, "middle")
