"""Public blocks: shapes, gradients, and identity with the models' blocks."""

import doctest
from typing import Any

import pytest
import torch
from torch import nn

import lightspine
from lightspine import blocks
from support.reference import fill_checkpoint

DIM = 16
# Block -> (options for a small test, smallest model with the block, options of that model).
BLOCKS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "EfficientModAttentionBlock": ({"num_heads": 2, "min_head_dim": 12}, "efficientmod_xxs", {}),
    "EfficientModBlock": ({"expand_ratio": 4}, "efficientmod_xxs", {}),
    "EfficientViMBlock": ({"state_dim": 5}, "efficientvim_m1", {}),
    "HSMSSD": ({"state_dim": 5}, "efficientvim_m1", {}),
    "NCSSD": ({"state_dim": 5}, "efficientvim_m1", {"mixer": "nc-ssd"}),
    "SHSA": ({"partial_dim": 6}, "shvit_s1", {}),
    "SHViTBlock": ({}, "shvit_s1", {}),
    "SS2D": ({"state_dim": 2}, "vmamba_tiny", {}),
    "VSSBlock": ({}, "vmamba_tiny", {}),
    "VimBlock": ({"state_dim": 4}, "vim_tiny", {}),
    "VimMixer": ({"state_dim": 4}, "vim_tiny", {}),
}
# EfficientViM's softmax over positions is invariant to A, whose gradient is therefore zero.
WITHOUT_EFFECT = {"HSMSSD": {"A"}, "NCSSD": {"A"}, "EfficientViMBlock": {"mixer.A"}}


def make_block(name: str) -> nn.Module:
    """Build a float64 block with nonzero weights, because some branches are initialized with zeros."""
    block = getattr(blocks, name)(DIM, **BLOCKS[name][0])
    shapes = {key: list(x.shape) for key, x in block.state_dict().items()}
    block.load_state_dict(fill_checkpoint(shapes))
    return block.double()


def test_every_public_block_is_tested():
    assert sorted(BLOCKS) == sorted(blocks.__all__)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (14, 14)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", BLOCKS)
def test_block_keeps_the_shape_of_a_map(name, size):
    x = torch.randn(2, DIM, *size, dtype=torch.float64)
    y = make_block(name).eval()(x)
    assert y.shape == x.shape
    assert y.isfinite().all()


@pytest.mark.parametrize("name", BLOCKS)
def test_gradient_reaches_every_parameter_and_the_input(name):
    # In evaluation mode, because batch statistics cancel a preceding bias, such as that of SHSA's norm.
    block = make_block(name).eval()
    x = torch.randn(2, DIM, 7, 5, dtype=torch.float64, requires_grad=True)
    y = block(x)
    (y * torch.randn_like(y)).sum().backward()
    tensors = dict(block.named_parameters()) | {"input": x}
    largest = {key: 0.0 if p.grad is None else p.grad.abs().max().item() for key, p in tensors.items()}
    assert {key for key, value in largest.items() if value < 1e-10} == WITHOUT_EFFECT.get(name, set())


@pytest.mark.parametrize("name", BLOCKS)
def test_memory_format_does_not_change_the_result(name):
    block = make_block(name).eval()
    x = torch.randn(2, DIM, 7, 5, dtype=torch.float64)
    innermost = block(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(innermost, block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_memory_format_does_not_change_the_gradients_of_one_image(name):
    """PyTorch's BatchNorm misreads gradients in ambiguous strides, which only a batch of one can have."""
    block = make_block(name).eval()
    x = torch.randn(1, DIM, 7, 5, dtype=torch.float64)
    weights = torch.randn_like(x)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        block.zero_grad()
        (block(leaf) * weights).sum().backward()
        found.append([leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
    for contiguous, innermost in zip(*found, strict=True):
        torch.testing.assert_close(contiguous, innermost, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_leaves_its_input_as_it_was(name):
    x = torch.randn(2, DIM, 7, 5, dtype=torch.float64)
    before = x.clone()
    make_block(name).eval()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", BLOCKS)
def test_model_is_made_of_the_block(name):
    _, model_name, options = BLOCKS[name]
    with torch.device("meta"):
        model = lightspine.create_model(model_name, **options)
    assert any(isinstance(module, getattr(blocks, name)) for module in model.modules())


@pytest.mark.parametrize("name", BLOCKS)
def test_example_in_the_docstring_runs_by_itself(name):
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(blocks, name), name, globs={})
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.attempted > 0
    assert not result.failed, "".join(report)
