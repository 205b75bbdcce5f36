"""The `Mamba` module and its `Block`, as `mamba_ssm.modules.mamba_simple`, with the options of Vim."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.compat.causal_conv1d import causal_conv1d_update, convolve
from lightspine.compat.checks import at_least_float32
from lightspine.compat.norms import RMSNorm, layer_norm_fn, rms_norm_fn
from lightspine.compat.selective_scan import scan_projected, selective_scan_fn
from lightspine.compat.state_update import selective_state_update
from lightspine.errors import UsageError

_DIRECTIONS = ("none", "v1", "v2", "v3")
_DT_INITS = ("random", "constant")


class Mamba(nn.Module):
    """Mamba's mixer of tokens, with the parameters and state-dict names of mamba_ssm and of Vim.

    Args:
        d_model: channels C of the tokens.
        d_state: states N per inner channel.
        d_conv: width of the causal convolution.
        expand: inner channels per channel.
        dt_rank: rank of the projection of dt; "auto" is ceil(C / 16).
        dt_min: smallest initial dt.
        dt_max: largest initial dt.
        dt_init: initial weight of the projection of dt, "random" (uniform) or "constant".
        dt_scale: factor of that weight.
        dt_init_floor: lower bound of the initial dt.
        conv_bias: the convolution has a bias.
        bias: the input and output projections have a bias.
        use_fast_path: recompute cheap intermediates in the backward pass instead of saving them.
        layer_idx: key of this layer in the cache of `inference_params`.
        device: of the parameters.
        dtype: of the parameters; A and D stay in float32.
        bimamba_type: "none" scans forward; "v1" adds a scan in reverse that shares all but A; "v2" adds one
            with its own convolution, projections, A and D; "v3" (SegMamba) adds to "v2" a scan of the tokens
            ordered by their position within a slice.
        if_divide_out: for "v2": halve the sum of both directions.
        init_layer_scale: initial value of a learned scale per output channel; `None` for no scale.
        bimamba: the argument of VideoMamba: `True` is `bimamba_type="v2"`, `False` is "none".
        nslices: for "v3": number of slices of the sequence.

    Raises:
        UsageError: an unknown `bimamba_type` or `dt_init`.
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    A_b_log: nn.Parameter
    A_s_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        bimamba: bool | None = None,
        nslices: int = 5,
    ) -> None:
        super().__init__()
        if bimamba is not None:
            bimamba_type = "v2" if bimamba else "none"
        if bimamba_type not in _DIRECTIONS:
            expected = ", ".join(map(repr, _DIRECTIONS))
            raise UsageError(f"Mamba expects bimamba_type {expected}, received {bimamba_type!r}")
        if dt_init not in _DT_INITS:
            raise UsageError(f"Mamba expects dt_init 'random' or 'constant', received {dt_init!r}")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.bimamba_type = bimamba_type
        self.if_divide_out = if_divide_out
        self.nslices = nslices
        self.init_layer_scale = init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))
        self.activation = "silu"
        self.act = nn.SiLU()

        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **options)
        self._add_direction("", conv_bias, options)
        self._init_dt(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        if bimamba_type == "v1":
            self.A_b_log = self._initial_matrix(device)
        elif bimamba_type in ("v2", "v3"):
            self._add_direction("_b", conv_bias, options)
        if bimamba_type == "v3":
            self._add_direction("_s", conv_bias, options)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)

    def _add_direction(self, suffix: str, conv_bias: bool, options: dict[str, Any]) -> None:
        """Add the convolution, projections, A and D of one direction: "", "_b" or "_s"."""
        conv = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            self.d_conv,
            padding=self.d_conv - 1,
            groups=self.d_inner,
            bias=conv_bias,
            **options,
        )
        x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False, **options)
        self.add_module(f"conv1d{suffix}", conv)
        self.add_module(f"x_proj{suffix}", x_proj)
        self.add_module(f"dt_proj{suffix}", nn.Linear(self.dt_rank, self.d_inner, **options))
        D = nn.Parameter(torch.ones(self.d_inner, device=options["device"]))
        D._no_weight_decay = True  # type: ignore[attr-defined]
        name = f"A{suffix}_log"
        self.register_parameter(name, self._initial_matrix(options["device"]))
        self.register_parameter(f"D{suffix}", D)

    def _initial_matrix(self, device: torch.device | str | None) -> nn.Parameter:
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        A_log = nn.Parameter(torch.log(states).repeat(self.d_inner, 1))
        A_log._no_weight_decay = True  # type: ignore[attr-defined]
        return A_log

    def _init_dt(self, low: float, high: float, kind: str, scale: float, floor: float) -> None:
        """Initialize the projection of dt of the first direction; that of the second one keeps PyTorch's."""
        bound = self.dt_rank**-0.5 * scale
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        with torch.no_grad():
            if kind == "constant":
                weight.fill_(bound)
            else:
                weight.uniform_(-bound, bound)
            dt = torch.exp(torch.rand_like(bias) * (math.log(high) - math.log(low)) + math.log(low))
            dt = dt.clamp(min=floor)
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        # Keeps initializers of whole models from setting it to zero.
        bias._no_reinit = True  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Mix tokens (B, L, C).

        With `inference_params`, an object with `seqlen_offset` and the dictionary `key_value_memory_dict`,
        the states are kept there between calls: the first call takes the prompt, later ones one token each.

        Raises:
            UsageError: `inference_params` for a module that scans in both directions, or without `layer_idx`.
        """
        if inference_params is None:
            return self._scale(self._mix(hidden_states))
        self._check_one_way()
        states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *states)[0]
        return self._scale(self._mix_and_keep_states(hidden_states, *states))

    def _scale(self, out: Tensor) -> Tensor:
        return out if self.init_layer_scale is None else out * self.gamma

    def _check_one_way(self) -> None:
        if self.bimamba_type != "none":
            raise UsageError(
                "a Mamba module steps through a sequence only with bimamba_type 'none', received "
                f"{self.bimamba_type!r}"
            )

    def _mix(self, tokens: Tensor) -> Tensor:
        xz = self.in_proj(tokens).transpose(1, 2)
        A_b = _matrix(self.A_b_log) if self.bimamba_type == "v1" else None
        y = self._scan_direction(xz, "", _matrix(self.A_log), A_b)
        if self.bimamba_type in ("v2", "v3"):
            y = y + self._scan_direction(xz, "_b", _matrix(self.A_b_log), None)
        if self.bimamba_type == "v2" and self.if_divide_out:
            y = y / 2
        if self.bimamba_type == "v3":
            y = y + self._scan_slices(xz)
        return self.out_proj(y.transpose(1, 2))

    def _scan_slices(self, xz: Tensor) -> Tensor:
        """Scan across slices: the first token of every slice, then the second of every slice, and so on."""
        length = xz.shape[2]
        if length % self.nslices:
            raise UsageError(
                f"Mamba with bimamba_type 'v3' expects a multiple of nslices={self.nslices} tokens, received "
                f"{length}"
            )
        xz = xz.unflatten(2, (self.nslices, -1)).transpose(2, 3).flatten(2)
        y = self._scan_direction(xz, "_s", _matrix(self.A_s_log), None)
        return y.unflatten(2, (-1, self.nslices)).transpose(2, 3).flatten(2)

    def _scan_direction(self, xz: Tensor, suffix: str, A: Tensor, A_b: Tensor | None) -> Tensor:
        """Scan (B, 2 D, L) to (B, D, L); the suffix "_b" runs from the last token to the first."""
        conv, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        return scan_projected(
            "Mamba",
            xz,
            conv.weight,
            conv.bias,
            getattr(self, f"x_proj{suffix}").weight,
            dt_proj.weight,
            A,
            A_b,
            None,
            None,
            at_least_float32(getattr(self, f"D{suffix}")),
            at_least_float32(dt_proj.bias),
            checkpoint=self.use_fast_path,
            reverse=suffix == "_b",
        )

    def _mix_and_keep_states(self, tokens: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Mix tokens and write the states after the last one."""
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
        # Pads with zeros if there are fewer tokens than the state holds, and else keeps the last ones.
        conv_state.copy_(F.pad(x, (self.d_conv - x.shape[2], 0)))
        x = convolve(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, silu=True)
        dt, B, C = self._project(x.transpose(1, 2))
        y: Any
        y, last_state = selective_scan_fn(
            x,
            dt.transpose(1, 2),
            _matrix(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            at_least_float32(self.D),
            z,
            at_least_float32(self.dt_proj.bias),
            True,
            True,
        )
        ssm_state.copy_(last_state)
        return self.out_proj(y.transpose(1, 2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens (..., D) to dt (..., D), without its bias, and to B and C (..., N)."""
        low_rank, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(low_rank, self.dt_proj.weight), B, C

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the next token, (B, 1, C), and change both states in place; return output and states.

        Raises:
            UsageError: more than one token, or a module that scans in both directions.
        """
        self._check_one_way()
        if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            raise UsageError(
                f"Mamba.step expects one token, (B, 1, C), received {tuple(hidden_states.shape)}"
            )
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(
            x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation
        )
        dt, B, C = self._project(x)
        A = _matrix(self.A_log)
        y = selective_state_update(
            ssm_state, x, dt, A, B, C, self.D, z=z, dt_bias=self.dt_proj.bias, dt_softplus=True
        )
        return self._scale(self.out_proj(y)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,  # noqa: ARG002 (the states do not grow with the sequence)
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return zero states for `step`: of the convolution, (B, D, W), and of the scan, (B, D, N)."""
        conv, scan = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or conv.dtype),
            scan.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or scan.dtype),
        )

    def _get_states_from_cache(self, inference_params: Any, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise UsageError("a Mamba module keeps states between calls only if it has a layer_idx")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        return cache[self.layer_idx]


def _matrix(A_log: Tensor) -> Tensor:
    """Return the state matrix A."""
    return -torch.exp(at_least_float32(A_log))


class Block(nn.Module):
    """Residual block of Mamba: adds the residual, normalizes and mixes; returns the output and the sum.

    Args:
        dim: number of channels C.
        mixer_cls: called with `dim`, makes the mixer.
        norm_cls: called with `dim`, makes the norm: `nn.LayerNorm` or `RMSNorm`.
        fused_add_norm: add and normalize in one function, in float32.
        residual_in_fp32: return the sum in float32.

    Raises:
        UsageError: `fused_add_norm` with another norm.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.mixer: Any = mixer_cls(dim)
        self.norm: Any = norm_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise UsageError(
                f"fused_add_norm expects LayerNorm or RMSNorm, received {type(self.norm).__name__}"
            )

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Map the output of the previous block and the residual, both (B, L, C), to those of this block."""
        if self.fused_add_norm:
            function = rms_norm_fn if isinstance(self.norm, RMSNorm) else layer_norm_fn
            hidden_states, residual = function(
                hidden_states,
                self.norm.weight,
                self.norm.bias,
                residual=residual,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                eps=self.norm.eps,
            )
        else:
            total = hidden_states if residual is None else hidden_states + residual
            hidden_states = self.norm(total.to(self.norm.weight.dtype))
            residual = total.float() if self.residual_in_fp32 else total
        return self.mixer(hidden_states, inference_params=inference_params), residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Any:
        """Return the zero states of the mixer."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)
