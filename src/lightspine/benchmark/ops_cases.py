"""The shapes at which the scans are measured, and their inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.cross_scan import cross_scan
from lightspine.ops.selective_scan import scan

Operator = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class ScanCase:
    """One shape of one of the two scans.

    Attributes:
        name: what the tables call it.
        dim: channels D of the map or of the sequence.
        height: rows of the map; 1 for a sequence.
        width: columns of the map; the positions of a sequence.
        state_dim: states N per channel.
        directions: directions K over a map; 0 for a sequence, which is gated as in Vim.
    """

    name: str
    dim: int
    height: int
    width: int
    state_dim: int
    directions: int

    @property
    def length(self) -> int:
        """Positions L."""
        return self.height * self.width

    @property
    def channels(self) -> int:
        """Scanned channels, K D."""
        return self.dim * max(self.directions, 1)

    def operator(self, backend: str) -> Operator:
        """Return the scan of `inputs` by one backend."""

        def over_a_map(*tensors: Tensor) -> Tensor:
            x, delta, A, B, C, skip, bias = tensors
            return cross_scan(x, delta, A, B, C, skip, bias, backend=backend)

        def over_a_sequence(*tensors: Tensor) -> Tensor:
            u, delta, A, B, C, skip, gate, bias = tensors
            return scan(u, delta, A, B, C, skip, gate, bias, delta_softplus=True, backend=backend)

        return over_a_map if self.directions else over_a_sequence

    def inputs(self, batch: int) -> list[Tensor]:
        """Return float32 inputs, all that the operator takes, in the layout in which the models hand them.

        Steps are drawn around softplus(-3), A is -1, ..., -N, as at the start of a training.
        """
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        scanned = (self.directions, self.dim) if self.directions else (self.dim,)
        A = -torch.arange(1.0, self.state_dim + 1).expand(*scanned, -1).contiguous()
        skip, bias = torch.ones(scanned), torch.full(scanned, -3.0)
        if self.directions:
            pixels = (batch, self.height, self.width)
            B, C = normal(2, *pixels, self.directions, self.state_dim)
            return [normal(*pixels, self.dim), normal(*pixels, *scanned), A, B, C, skip, bias]
        u, delta, gate = normal(3, batch, self.length, self.dim).transpose(2, 3)
        B, C = normal(2, batch, self.length, 1, self.state_dim).permute(0, 1, 3, 4, 2)
        return [u, delta, A, B, C, skip, gate, bias]


def _stage(number: int, dim: int, side: int) -> ScanCase:
    return ScanCase(name=f"vmamba-{number}", dim=dim, height=side, width=side, state_dim=1, directions=4)


def _vim(length: int) -> ScanCase:
    return ScanCase(name=f"vim-{length}", dim=384, height=1, width=length, state_dim=16, directions=0)


# VMamba-T's stages at 224 pixels; Vim-Ti at 224 (patches of 16 pixels), 512 and 1248.
CASES = (
    _stage(1, 96, 56),
    _stage(2, 192, 28),
    _stage(3, 384, 14),
    _stage(4, 768, 7),
    _vim(197),
    _vim(1025),
    _vim(6085),
)


def find_cases(names: Sequence[str]) -> list[ScanCase]:
    """Return the cases of these names, in this order.

    Raises:
        UsageError: a name that no case has, or no name.
    """
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"expected shapes out of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return [known[name] for name in names]
