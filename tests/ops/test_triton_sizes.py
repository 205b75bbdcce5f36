"""How a scan is cut for a device: nothing here needs Triton."""

import pytest

from lightspine.ops.triton.config import choose_blocks, programs_per_launch, scratch_size

MIB = 1024 * 1024


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("length", [1, 31, 33, 197, 3136, 6085])
@pytest.mark.parametrize("state_dim", [1, 3, 16, 64])
@pytest.mark.parametrize("rows", [0, 1, 512])
def test_chunks_are_whole_tiles_and_cover_the_sequence_once(
    backward: bool, length: int, state_dim: int, rows: int
) -> None:
    blocks = choose_blocks(length, 96, state_dim, rows, 4, backward=backward)
    assert blocks.chunk % blocks.tile == 0
    assert (blocks.chunks - 1) * blocks.chunk < length <= blocks.chunks * blocks.chunk


@pytest.mark.parametrize("state_dim", [1, 3, 5, 16, 17])
def test_states_are_padded_to_the_next_power_of_two(state_dim: int) -> None:
    states = choose_blocks(100, 96, state_dim, 1, 4, backward=False).states
    assert states & (states - 1) == 0
    assert states // 2 < state_dim <= states


def test_one_image_at_high_resolution_is_cut_for_a_whole_device() -> None:
    blocks = choose_blocks(256 * 256, 96, 1, 1, 4, backward=False)
    assert blocks.chunks * 3 >= 1056


def test_large_batch_is_not_cut_in_the_forward() -> None:
    assert choose_blocks(3136, 96, 1, 512, 4, backward=False).chunks == 1


@pytest.mark.parametrize("length", [197, 6085, 1_000_000])
@pytest.mark.parametrize(("state_dim", "programs"), [(1, 1056), (16, 1056), (64, 512)])
def test_scratch_of_the_backward_does_not_grow_with_the_scan(
    length: int, state_dim: int, programs: int
) -> None:
    blocks = choose_blocks(length, 768, state_dim, 512, 4, backward=True)
    most = programs_per_launch(blocks, state_dim, 4)
    assert most >= programs
    assert most * scratch_size(blocks, state_dim) * 4 <= 128 * MIB
