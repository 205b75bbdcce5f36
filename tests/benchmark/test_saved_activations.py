import torch
import torch.nn as nn

from lightspine.benchmark.saved_activations import count_saved_bytes


def test_saved_bytes_are_those_of_the_activations() -> None:
    # A linear layer saves its input, which exists anyway; the sigmoid saves its output, 5 x 8 values.
    module = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid())
    assert count_saved_bytes(module, torch.zeros(5, 4)) == 5 * 8 * 4


def test_storage_that_is_kept_twice_counts_once() -> None:
    # The sigmoid's output is also the input of the second linear map.
    module = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))
    assert count_saved_bytes(module, torch.zeros(5, 4)) == 5 * 8 * 4


def test_frozen_module_keeps_nothing() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid()).requires_grad_(False)
    assert count_saved_bytes(module, torch.zeros(5, 4)) == 0
