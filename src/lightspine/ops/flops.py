"""How many operations a scan counts for, in one place, so that every table of the library agrees.

The papers print "FLOPs" that are multiply-adds for convolutions and linear maps, and add `9 B L D N` for a
scan (plus `B L D` for the skip and for the gate): the figure that VMamba's code hands to fvcore. `scan_flops`
is that figure.

PyTorch's `FlopCounterMode` counts two per multiply-add. The operators therefore register twice `scan_flops`,
so that half of what the counter shows is comparable with the papers for the whole network.
"""


def scan_flops(
    batch: int, length: int, dim: int, state_dim: int, with_D: bool = True, with_z: bool = False
) -> int:
    """Return the published cost of one scan, in the unit in which the papers count (see the module's text).

    Args:
        batch: number of sequences.
        length: positions per sequence.
        dim: channels; for a scan in K directions, K times the channels of the map.
        state_dim: states per channel, N.
        with_D: the scan adds the skip `D u`.
        with_z: the scan multiplies by a gate.
    """
    positions = batch * length * dim
    return 9 * positions * state_dim + positions * with_D + positions * with_z


def counted_forward(flops: int) -> int:
    """Return what `FlopCounterMode` is told for a forward scan: two per multiply-add."""
    return 2 * flops


def counted_backward(flops: int) -> int:
    """Return what `FlopCounterMode` is told for a backward scan.

    As for a convolution, the gradients cost twice the forward; the states are computed once more on the way.
    """
    return 3 * counted_forward(flops)
