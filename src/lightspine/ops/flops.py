"""FLOP counts of the scans, shared by all tables of the library.

Papers report "FLOPs" that are multiply-adds for convolutions and linear layers, and add `9 B L D N` for a
scan (plus `B L D` for the skip connection and for the gate), the count that VMamba's code passes to fvcore.
`scan_flops` is that count.

PyTorch's `FlopCounterMode` counts two per multiply-add. The operators therefore register twice
`scan_flops`, so that half of the total of the counter is comparable with the papers.
"""


def scan_flops(
    batch: int, length: int, dim: int, state_dim: int, with_D: bool = True, with_z: bool = False
) -> int:
    """Return the published cost of one scan, in the unit of the papers (see the module docstring).

    Args:
        batch: number of sequences.
        length: positions per sequence.
        dim: channels; for a scan in K directions, K times the channels of the map.
        state_dim: states per channel, N.
        with_D: the scan adds the skip connection `D u`.
        with_z: the scan multiplies by a gate.
    """
    positions = batch * length * dim
    return 9 * positions * state_dim + positions * with_D + positions * with_z


def counted_forward(flops: int) -> int:
    """Return the count that `FlopCounterMode` gets for a forward scan: two per multiply-add."""
    return 2 * flops


def counted_backward(flops: int) -> int:
    """Return the count that `FlopCounterMode` gets for a backward scan.

    As for a convolution, the gradients cost twice the forward; the states are recomputed once as well.
    """
    return 3 * counted_forward(flops)
