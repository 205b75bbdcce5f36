"""Vim's token sequence: where the class token stands, and how its position table changes size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import LightspineError

CLASS_TOKENS = ("middle", "head", "double", "none")


def count_class_tokens(class_token: str) -> int:
    """Return how many rows of a sequence are class tokens."""
    return {"middle": 1, "head": 1, "double": 2, "none": 0}[class_token]


def patches_of(x: Tensor, class_token: str) -> Tensor:
    """Return a sequence (B, N, C) without its class tokens, (B, M, C)."""
    if class_token == "middle":
        middle = (x.shape[1] - 1) // 2
        return torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)
    if class_token == "head":
        return x[:, 1:]
    if class_token == "double":
        return x[:, 1:-1]
    return x


def class_tokens_of(x: Tensor, class_token: str) -> Tensor:
    """Return the class tokens (B, K, C) of a sequence (B, N, C)."""
    if class_token == "middle":
        middle = (x.shape[1] - 1) // 2
        return x[:, middle : middle + 1]
    if class_token == "head":
        return x[:, :1]
    if class_token == "double":
        return torch.cat((x[:, :1], x[:, -1:]), dim=1)
    return x[:, :0]


def join_tokens(patches: Tensor, tokens: Tensor, class_token: str) -> Tensor:
    """Put K class tokens (B, K, C) where they belong among M patch tokens (B, M, C): (B, M + K, C).

    "middle" is before patch M // 2, "head" before the first, "double" before the first and after the last.
    """
    if class_token == "middle":
        middle = patches.shape[1] // 2
        return torch.cat((patches[:, :middle], tokens, patches[:, middle:]), dim=1)
    if class_token == "head":
        return torch.cat((tokens, patches), dim=1)
    if class_token == "double":
        return torch.cat((tokens[:, :1], patches, tokens[:, 1:]), dim=1)
    return patches


def resize_pos_embed(
    table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], class_token: str
) -> Tensor:
    """Resize a position table (1, M + K, C) from one grid of patches to another, class rows left as they are.

    The rows of the patches are resized as a map (bicubic, `align_corners=False`); the rows of the class
    tokens are taken out first and put back where the class tokens of the new sequence stand.

    The official fine-tuning script resizes the tables of middle-token models as if the class token stood at
    the head, which shifts half of the map by one patch; `class_token="head"` on such a table repeats that.

    Args:
        table: position table, one row per token of the sequence.
        grid: (rows, columns) of patches that the table was made for.
        new_grid: (rows, columns) of patches that are wanted.
        class_token: "middle", "head", "double" or "none".
    """
    symbolic = False
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        # An export with dynamic sizes must not take the branch of its example.
        sides: tuple[object, object] = new_grid
        symbolic = isinstance(sides[0], torch.SymInt) or isinstance(sides[1], torch.SymInt)
    if not symbolic and grid[0] == new_grid[0] and grid[1] == new_grid[1]:
        return table
    patches = patches_of(table, class_token)
    field = patches.transpose(1, 2).reshape(1, -1, grid[0], grid[1])
    field = F.interpolate(field, size=(new_grid[0], new_grid[1]), mode="bicubic", align_corners=False)
    return join_tokens(field.flatten(2).transpose(1, 2), class_tokens_of(table, class_token), class_token)


def square_grid(rows: int, class_token: str) -> tuple[int, int]:
    """Return the square grid of patches that a table of so many rows was made for.

    Raises:
        LightspineError: the patches do not form a square.
    """
    patches = rows - count_class_tokens(class_token)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise LightspineError(
            f"cannot resize a position table of {rows} rows: expected a square grid of patches and "
            f"{count_class_tokens(class_token)} class token(s), received {patches} patches; "
            f"build the model with the checkpoint's img_size=(height, width)"
        )
    return side, side
