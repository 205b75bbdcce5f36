"""The blocks of EfficientViM: HSM-SSD and NC-SSD mixers, the gated block, stem, stage and classifier.

Every block takes and gives maps (B, C, H, W) of any size. Values do not depend on the memory layout; the
blocks are fastest with channels innermost (`torch.channels_last`): flattening and transposing is then free.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite, trunc_normal_
from timm.models import checkpoint
from torch import Tensor

from lightspine.errors import UsageError

Mixer = Literal["hsm-ssd", "nc-ssd"]


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm and, where asked for, ReLU; the map keeps its size at stride 1."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool = False,
    ) -> None:
        conv = nn.Conv2d(
            in_dim, out_dim, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_dim))
        if act:
            layers["act"] = nn.ReLU(inplace=True)
        super().__init__(layers)


class ChannelNorm(nn.Module):
    """LayerNorm over axis 1 of (B, C, L) or (B, C, H, W).

    Weight and bias are stored as (1, C, 1) or, with `axes=2`, (1, C, 1, 1), as published: a rule that spares
    one-dimensional parameters from weight decay then decays this weight, and the models were trained so.
    """

    def __init__(self, dim: int, axes: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        shape = (1, dim) + (1,) * axes
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, self.eps).movedim(-1, 1)


class _StateMixer(nn.Module):
    """What both mixers share: how every position writes to the hidden state and reads from it."""

    def __init__(self, dim: int, state_dim: int, expand: float) -> None:
        super().__init__()
        if dim < 1 or state_dim < 1 or int(expand * dim) < 1:
            raise UsageError(
                "a mixer needs a positive dim, state_dim and expand * dim, "
                f"got dim={dim}, state_dim={state_dim}, expand={expand}"
            )
        self.bcdt_proj = nn.Conv2d(dim, 3 * state_dim, 1, bias=False)
        self.dwconv = nn.Conv2d(3 * state_dim, 3 * state_dim, 3, padding=1, groups=3 * state_dim, bias=False)
        # A shifts all positions alike and the softmax over positions forgets it: kept for the checkpoints.
        self.A = nn.Parameter(torch.empty(state_dim).uniform_(1.0, 16.0))
        self.D = nn.Parameter(torch.ones(1))

    def write_and_read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each position writes to and reads from each of the N states, both (B, L, N)."""
        b, c, dt = self.dwconv(self.bcdt_proj(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        return b * (dt + self.A).softmax(dim=1), c


class HSMSSD(_StateMixer):
    r"""Hidden-state-mixer SSD (EfficientViM, section 3.2): the channels are mixed in the hidden state.

    From the input x (C, L), L = H W, a pointwise and a depthwise convolution make B, C and dt, each (N, L).
    With W = softmax over positions of dt + A, the hidden state is

        h = x (W * B)^T                       (C, N): a global summary in N vectors
        h = P_out (h_1 * SiLU(z) + D h_1),    [h_1, z] = P_in h
        y = h C                               (C, L)

    The two projections run over N states in place of L positions: 3 C^2 N multiply-adds in place of 3 C^2 L.

    Args:
        dim: channels C of the map.
        state_dim: number N of states.
        expand: width of the projected state over C.

    Raises:
        UsageError: a size is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import HSMSSD
        >>> mixer = HSMSSD(64, state_dim=16)
        >>> mixer(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(self, dim: int, state_dim: int = 64, expand: float = 1.0) -> None:
        super().__init__(dim, state_dim, expand)
        inner_dim = int(expand * dim)
        self.state_channels = dim
        self.hz_proj = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map (B, C, H, W) and the mixed hidden state (B, C, N)."""
        write, read = self.write_and_read(x)
        state = write.transpose(1, 2) @ x.flatten(2).transpose(1, 2)  # B N C
        h, z = self.hz_proj(state).chunk(2, dim=-1)
        state = self.out_proj(h * (F.silu(z) + self.D))
        y = (read @ state).transpose(1, 2)  # B C L
        return y.unflatten(2, (x.shape[2], x.shape[3])), state.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(x)[0]


class NCSSD(_StateMixer):
    """Non-causal SSD, the mixer that the paper starts from: the channels are mixed at every position.

    B, C, dt and W are those of `HSMSSD`; projections and gate stay with the sequence, as in Mamba-2:

        [u, z] = P_in x                       each (expand C, L)
        h = u (W * B)^T                       (expand C, N)
        y = P_out ((h C + D u) * SiLU(z))     (C, L)

    Args:
        dim: channels C of the map.
        state_dim: number N of states.
        expand: width of the projected sequence over C.

    Raises:
        UsageError: a size is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import NCSSD
        >>> mixer = NCSSD(64, state_dim=16)
        >>> mixer(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(self, dim: int, state_dim: int = 64, expand: float = 1.0) -> None:
        super().__init__(dim, state_dim, expand)
        inner_dim = int(expand * dim)
        self.state_channels = inner_dim
        self.uz_proj = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map (B, C, H, W) and the hidden state (B, expand C, N)."""
        write, read = self.write_and_read(x)
        u, z = self.uz_proj(x.flatten(2).transpose(1, 2)).chunk(2, dim=-1)
        state = write.transpose(1, 2) @ u  # B N C
        y = self.out_proj((read @ state + self.D * u) * F.silu(z)).transpose(1, 2)  # B C L
        return y.unflatten(2, (x.shape[2], x.shape[3])), state.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(x)[0]


class FFN(nn.Sequential):
    """Two pointwise convolutions, each with BatchNorm, and a ReLU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(OrderedDict(fc1=ConvNorm(dim, hidden_dim, act=True), fc2=ConvNorm(hidden_dim, dim)))


class EfficientViMBlock(nn.Module):
    """The EfficientViM block (section 3.3): depthwise convolution, mixer, depthwise convolution, FFN.

    Each of the four branches f is blended in by a learned gate per channel, x <- (1 - a) x + a f(x) with
    a = sigmoid(alpha). Alpha starts at 1e-4, so the gates start half open: this is no residual connection
    with a small layer scale.

    Args:
        dim: channels C of the map.
        state_dim: number N of states of the mixer.
        mlp_ratio: hidden width of the FFN over C.
        expand: inner width of the mixer over C.
        mixer: "hsm-ssd" mixes channels in the hidden state, "nc-ssd" at every position.
        drop_path: probability with which a sample skips a branch in training (the paper: 0).

    Raises:
        UsageError: unknown mixer, or a size that is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import EfficientViMBlock
        >>> block = EfficientViMBlock(64, state_dim=16)
        >>> block(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 64,
        mlp_ratio: float = 4.0,
        expand: float = 1.0,
        mixer: Mixer = "hsm-ssd",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if mixer not in ("hsm-ssd", "nc-ssd"):
            raise UsageError(f"mixer must be 'hsm-ssd' or 'nc-ssd', got {mixer!r}")
        self.dwconv1 = ConvNorm(dim, dim, 3, groups=dim)
        self.norm = ChannelNorm(dim)
        mixer_cls = HSMSSD if mixer == "hsm-ssd" else NCSSD
        self.mixer: HSMSSD | NCSSD = mixer_cls(dim, state_dim, expand)
        self.dwconv2 = ConvNorm(dim, dim, 3, groups=dim)
        self.ffn = FFN(dim, int(dim * mlp_ratio))
        self.alpha = nn.Parameter(torch.full((4, dim), 1e-4))
        self.drop_path = DropPath(drop_path)

    def _blend(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        # Under autocast the branches are in half precision and the published blend is in that of the gate.
        x, update = x.to(gate.dtype), update.to(gate.dtype)
        if self.training and self.drop_path.drop_prob > 0.0:
            return x + self.drop_path(gate * (update - x))
        return torch.lerp(x, update, gate)

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map (B, C, H, W) and the mixer's hidden state (B, C, N)."""
        gate = self.alpha.sigmoid()[:, :, None, None]
        x = self._blend(x, self.dwconv1(x), gate[0])
        update, state = self.mixer.forward_with_state(self.norm(x))
        x = self._blend(x, update, gate[1])
        x = self._blend(x, self.dwconv2(x), gate[2])
        return self._blend(x, self.ffn(x), gate[3]), state

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(x)[0]


class Stem(nn.Sequential):
    """Four 3x3 convolutions with BatchNorm; ReLU after the first three. Published, each has stride 2."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__(
            ConvNorm(in_chans, dim // 8, 3, stride=strides[0], act=True),
            ConvNorm(dim // 8, dim // 4, 3, stride=strides[1], act=True),
            ConvNorm(dim // 4, dim // 2, 3, stride=strides[2], act=True),
            ConvNorm(dim // 2, dim, 3, stride=strides[3]),
        )


class PatchMerging(nn.Module):
    """Halve the map: an inverted bottleneck with squeeze-excite between two depthwise residual convolutions.

    The hidden width is four times the width that comes out.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        hidden_dim = 4 * out_dim
        self.dwconv1 = ConvNorm(in_dim, in_dim, 3, groups=in_dim)
        self.conv = nn.Sequential(
            ConvNorm(in_dim, hidden_dim, act=True),
            ConvNorm(hidden_dim, hidden_dim, 3, stride=2, groups=hidden_dim, act=True),
            SqueezeExcite(hidden_dim, rd_ratio=0.25),
            ConvNorm(hidden_dim, out_dim),
        )
        self.dwconv2 = ConvNorm(out_dim, out_dim, 3, groups=out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x + self.dwconv1(x))
        return x + self.dwconv2(x)


class Stage(nn.Module):
    """Down-sampling where there is any, then the blocks; gives the map and the last block's hidden state."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[EfficientViMBlock]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.downsample(x)
        state = x
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x, state = checkpoint(block.forward_with_state, x)
            else:
                x, state = block.forward_with_state(x)  # type: ignore[operator]
        return x, state


class FusionHead(nn.Module):
    """One linear classifier per pooled feature vector; the logits are their softmax-weighted sum.

    Args:
        widths: width of each vector; the input (B, sum of widths) is all of them in a row.
        num_classes: number of classes.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.widths = list(widths)
        self.weights = nn.Parameter(torch.ones(len(widths)))
        linears = [nn.Linear(width, num_classes) for width in widths]
        for linear in linears:
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.fc = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights.softmax(0)
        parts = x.split(self.widths, dim=1)
        logits = [weights[i] * fc(parts[i]) for i, fc in enumerate(self.fc)]
        return torch.stack(logits).sum(0)
