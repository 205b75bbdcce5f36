"""Layers of a detector or segmenter whose shapes depend on the number of classes."""

from torch import Tensor


def differs_by_classes(found: Tensor, expected: Tensor, in_file: int, in_network: int) -> bool:
    """Return whether the shapes of two weights or biases differ by the numbers of classes alone.

    The first dimension of a class layer is a multiple of the number of classes, with or without the
    background.

    Args:
        found: tensor of a file.
        expected: tensor of the network.
        in_file: number of classes of the file.
        in_network: number of classes of the network.
    """
    if in_file == in_network or found.shape[1:] != expected.shape[1:]:
        return False
    return any(
        len(found) * (in_network + background) == len(expected) * (in_file + background)
        for background in (0, 1)
    )
