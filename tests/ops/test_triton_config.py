"""Block sizes and chunking of the Triton kernels; runs without Triton."""

from typing import Any

import pytest
import torch

from lightspine.ops.triton.config import CHUNK_UNIT, STRETCH, ScanConfig, choose_config

MIB = 2**20


def choose(batch: int, length: int, dim: int = 96, states: int = 1, **options: Any) -> ScanConfig:
    options = {"launched_groups": 1, "backward": False} | options
    return choose_config(batch, length, 1, dim, states, torch.bfloat16, **options)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("length", [1, 31, 33, 197, 3136, 6085])
@pytest.mark.parametrize("state_dim", [1, 3, 16, 64])
@pytest.mark.parametrize("batch", [0, 1, 512])
def test_chunks_are_whole_stretches_and_cover_the_sequence_once(
    backward: bool, length: int, state_dim: int, batch: int
) -> None:
    config = choose(batch, length, states=state_dim, backward=backward)
    assert config.chunk % (STRETCH if backward else CHUNK_UNIT) == 0
    assert config.chunk <= config.stretches * STRETCH or not backward
    assert (config.chunks - 1) * config.chunk < length <= config.chunks * config.chunk


@pytest.mark.parametrize("state_dim", [1, 3, 5, 16, 17])
def test_states_are_padded_to_the_next_power_of_two(state_dim: int) -> None:
    states = choose(1, 100, states=state_dim).block_n
    assert states & (states - 1) == 0
    assert states // 2 < state_dim <= states


def test_one_image_at_high_resolution_is_cut_for_a_whole_device() -> None:
    assert choose(1, 256 * 256).chunks >= 1024


def test_large_batch_is_not_cut() -> None:
    assert choose(2048, 3136).chunks == 1


@pytest.mark.parametrize(
    ("batch", "length", "official"), [(128, 197, 103), (16, 1025, 64), (8, 6085, 188), (1, 6085, 24)]
)
def test_backward_of_vim_needs_no_more_memory_than_the_official_kernel(
    batch: int, length: int, official: int
) -> None:
    """Count the output, all gradients and all temporary tensors, in MiB.

    The official figures are the peaks measured on an H200.
    """
    dim, states = 384, 16
    config = choose(batch, length, dim, states, backward=True)
    images = min(batch, config.images_per_slice)
    tensors = 4 * batch * length * dim * 2 + 2 * batch * length * states * 4
    partial = 2 * images * -(-dim // config.grad_block_d) * length * states * 4
    at_chunks = images * config.chunks * (2 * states + 2) * dim * 4
    assert (tensors + partial + at_chunks) / MIB <= official


def test_slices_of_the_backward_do_not_grow_with_the_batch() -> None:
    few, many = (choose(batch, 197, 384, 16, backward=True).images_per_slice for batch in (128, 4096))
    assert few < 128
    assert many < 128
