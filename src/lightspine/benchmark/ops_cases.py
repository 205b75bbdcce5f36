"""Cases of the scan operator benchmark: shapes, inputs and the functions to time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.cross_scan import cross_scan
from lightspine.ops.selective_scan import scan


@dataclass(frozen=True, kw_only=True)
class ScanCase:
    """One shape of the selective scan or of the cross scan.

    Attributes:
        name: name in tables and options.
        dim: channels D of the feature map or sequence.
        height: rows of the feature map; 1 for a sequence.
        width: columns of the feature map; length of a sequence.
        state_dim: states N per channel.
        directions: scan directions K over a feature map; 0 for a sequence, which has a gate as in Vim.
    """

    name: str
    dim: int
    height: int
    width: int
    state_dim: int
    directions: int

    @property
    def length(self) -> int:
        """Sequence length L."""
        return self.height * self.width

    @property
    def channels(self) -> int:
        """Scanned channels, K D."""
        return self.dim * max(self.directions, 1)

    def operator(self, backend: str) -> Callable[..., Tensor]:
        """Return the scan with one backend, as a function of the tensors of `inputs`."""

        def run_cross_scan(*tensors: Tensor) -> Tensor:
            x, delta, A, B, C, skip, bias = tensors
            return cross_scan(x, delta, A, B, C, skip, bias, backend=backend)

        def run_selective_scan(*tensors: Tensor) -> Tensor:
            u, delta, A, B, C, skip, gate, bias = tensors
            return scan(u, delta, A, B, C, skip, gate, bias, delta_softplus=True, backend=backend)

        return run_cross_scan if self.directions else run_selective_scan

    def inputs(
        self, batch: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> list[Tensor]:
        """Return all inputs of the operator, in the memory layout that the models use.

        dt is softplus(-3 + noise) and A is -1, ..., -N, as at initialization.

        Args:
            batch: batch size.
            dtype: of all tensors but A, D and delta_bias, which are float32.
            device: where the tensors are.
        """
        normal = random_normal(dtype, device)
        scanned = (self.directions, self.dim) if self.directions else (self.dim,)
        A, skip, bias = self.parameters(*scanned, device=device)
        if self.directions:
            pixels = (batch, self.height, self.width)
            B, C = normal(2, *pixels, self.directions, self.state_dim)
            return [normal(*pixels, self.dim), normal(*pixels, *scanned), A, B, C, skip, bias]
        u, delta, gate = normal(3, batch, self.length, self.dim).transpose(2, 3)
        B, C = normal(2, batch, self.length, 1, self.state_dim).permute(0, 1, 3, 4, 2)
        return [u, delta, A, B, C, skip, gate, bias]

    def parameters(self, *channels: int, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, D and delta_bias of the scanned channels in float32."""
        A = -torch.arange(1.0, self.state_dim + 1, device=device).expand(*channels, -1).contiguous()
        return A, torch.ones(channels, device=device), torch.full(channels, -3.0, device=device)

    def forward(self, backend: str, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """Return a function that runs the scan without gradients."""
        operator = self.operator(backend)

        def run() -> Tensor:
            with torch.inference_mode():
                return operator(*inputs)

        return run

    def forward_backward(self, backend: str, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """Return a function that runs the scan and computes the gradients of all inputs."""
        operator = self.operator(backend)
        leaves = [t.detach().requires_grad_() for t in inputs]
        grad_output: list[Tensor] = []

        def run() -> object:
            out = operator(*leaves)
            if not grad_output:
                grad_output.append(torch.randn_like(out))
            return torch.autograd.grad(out, leaves, grad_output[0])

        return run

    def elementwise(self, batch: int) -> Callable[[], object]:
        """Return a function that computes softplus over (B, K D, L) and exp over (B, K D, L, N) in PyTorch.

        Every scan computes these values, so their time is a reference for the time of a scan. The outputs are
        preallocated.
        """
        dt = torch.randn(batch, self.channels, self.length)
        decay = -torch.rand(batch, self.channels, self.length, self.state_dim)
        dt_out, decay_out = torch.empty_like(dt), torch.empty_like(decay)

        def run() -> None:
            with torch.inference_mode():
                F.softplus(dt, out=dt_out)  # type: ignore[call-arg]
                torch.exp(decay, out=decay_out)

        return run


def random_normal(dtype: torch.dtype, device: str | torch.device) -> Callable[..., Tensor]:
    """Return a function that draws a normally distributed tensor of a shape, always the same sequence."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=dtype, device=device)


def _vmamba_case(stage: int, dim: int, side: int) -> ScanCase:
    return ScanCase(name=f"vmamba-{stage}", dim=dim, height=side, width=side, state_dim=1, directions=4)


def _vim_case(length: int) -> ScanCase:
    return ScanCase(name=f"vim-{length}", dim=384, height=1, width=length, state_dim=16, directions=0)


# The stages of VMamba-T at 224 pixels; Vim-Ti at 224, 512 and 1248 pixels (patches of 16 pixels).
CASES = (
    _vmamba_case(1, 96, 56),
    _vmamba_case(2, 192, 28),
    _vmamba_case(3, 384, 14),
    _vmamba_case(4, 768, 7),
    _vim_case(197),
    _vim_case(1025),
    _vim_case(6085),
)


def find_cases(names: Sequence[str]) -> list[ScanCase]:
    """Return the cases with these names, in this order.

    Raises:
        UsageError: a name is unknown, or there is none.
    """
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"expected shapes from {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return [known[name] for name in names]
