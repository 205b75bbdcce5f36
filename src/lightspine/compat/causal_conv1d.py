"""The functions of `causal_conv1d`, on lightspine's convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.compat.checks import check_shape, in_layout_of, uses_silu
from lightspine.errors import UsageError
from lightspine.ops.causal_conv1d import causal_conv1d


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise 1D convolution, as `causal_conv1d`'s function of this name.

    It computes in float32 (float64 for float64 input), also under autocast.

    Args:
        x: input, (B, D, L).
        weight: filters, (D, W).
        bias: (D,).
        seq_idx: number of the sequence that each position belongs to, (B, L): nothing is read across a change
            of the number. A string is taken for `activation`, the fourth argument before version 1.2.
        initial_states: the W - 1 positions before the first one, (B, D, W - 1); zeros by default.
        return_final_states: also return the last W - 1 positions of the input.
        final_states_out: receives them, (B, D, W - 1).
        activation: `None`, "silu" or "swish".

    Returns:
        (B, D, L) in the dtype of x; with `return_final_states` also the final states, (B, D, W - 1).

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, an unknown activation, or `seq_idx` together
            with states.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    silu = uses_silu("causal_conv1d_fn", activation)
    _check(x, weight, bias)
    batch, dim, length = x.shape
    reach = weight.shape[1] - 1
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise UsageError(
            "causal_conv1d_fn expects no initial_states and no return_final_states together with seq_idx"
        )
    before = x
    if initial_states is not None:
        check_shape(
            "causal_conv1d_fn", "initial_states", initial_states, (batch, dim, reach), "(B, D, W - 1)"
        )
        before = torch.cat((initial_states.to(x.dtype), x), dim=-1)
    if seq_idx is None:
        out = convolve(before, weight, bias, silu)[:, :, before.shape[2] - length :]
    else:
        check_shape("causal_conv1d_fn", "seq_idx", seq_idx, (batch, length), "(B, L)")
        out = _convolve_sequences(x, weight, bias, seq_idx, silu)
    out = in_layout_of(out, x)
    if not return_final_states:
        return out
    # Pads with zeros if the sequence is shorter than the filters, and else keeps the last positions.
    final_states = F.pad(before, (reach - before.shape[2], 0))
    if final_states_out is not None:
        check_shape(
            "causal_conv1d_fn", "final_states_out", final_states_out, (batch, dim, reach), "(B, D, W - 1)"
        )
        final_states = final_states_out.copy_(final_states)
    return out, final_states


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool = False) -> Tensor:
    """Convolve (B, D, L) with filters (D, W); returns (B, D, L), channels innermost in memory."""
    return causal_conv1d(x, weight[None], None if bias is None else bias[None], silu=silu, reverse=(reverse,))


def _convolve_sequences(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, silu: bool
) -> Tensor:
    """Convolve several sequences that follow each other along L."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[2], weight.shape[1]
    out = x.new_zeros(x.shape, dtype=dtype)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    for distance in range(min(width, length)):
        same = seq_idx[:, distance:] == seq_idx[:, : length - distance]
        past = x[:, :, : length - distance].to(dtype) * same[:, None]
        out = out + F.pad(past * weight[:, width - 1 - distance, None].to(dtype), (distance, 0))
    return (F.silu(out) if silu else out).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3:
        raise UsageError(f"causal_conv1d_fn expects x of shape (B, D, L), received {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise UsageError(
            f"causal_conv1d_fn expects weight of shape (D={x.shape[1]}, W), received {tuple(weight.shape)}"
        )
    check_shape("causal_conv1d_fn", "bias", bias, (x.shape[1],), "(D,)")


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next positions of a sequence and change its state in place; has no gradient.

    Args:
        x: the next S positions, (B, D, S), or one, (B, D).
        conv_state: the positions before them, (B, D, T) with T of at least W - 1; changed in place.
        weight: filters, (D, W).
        bias: (D,).
        activation: `None`, "silu" or "swish".
        cache_seqlens: number of positions so far, (B,): the state is then a ring buffer, and x is written
            from `cache_seqlens % T` on.
        conv_state_indices: row of `conv_state` that belongs to each sequence, (B,).

    Returns:
        The output in the shape and dtype of x.

    Raises:
        UsageError: shapes that do not fit, or an unknown activation.
    """
    name = "causal_conv1d_update"
    silu = uses_silu(name, activation)
    if x.dim() not in (2, 3):
        raise UsageError(f"{name} expects x of shape (B, D) or (B, D, S), received {tuple(x.shape)}")
    batch, dim, steps = (*x.shape, 1)[:3]
    if weight.dim() != 2 or weight.shape[0] != dim:
        raise UsageError(f"{name} expects weight of shape (D={dim}, W), received {tuple(weight.shape)}")
    width = weight.shape[1]
    check_shape(name, "bias", bias, (dim,), "(D,)")
    check_shape(name, "cache_seqlens", cache_seqlens, (batch,), "(B,)")
    check_shape(name, "conv_state_indices", conv_state_indices, (batch,), "(B,)")
    rows = conv_state.shape[0] if conv_state_indices is not None else batch
    if conv_state.dim() != 3 or conv_state.shape[:2] != (rows, dim) or conv_state.shape[2] < width - 1:
        raise UsageError(
            f"{name} expects conv_state of shape (B={rows}, D={dim}, T) with T of at least {width - 1}, "
            f"received {tuple(conv_state.shape)}"
        )
    state = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
    new = x.reshape(batch, dim, steps)
    length = state.shape[2]
    if cache_seqlens is None:
        joined = torch.cat((state, new.to(state.dtype)), dim=-1)
        read = torch.cat((state, new), dim=-1)[:, :, -(width - 1 + steps) :]
        state.copy_(joined[:, :, -length:])
    else:
        start = cache_seqlens.long()[:, None]
        past = (torch.arange(1 - width, 0, device=x.device) + start) % length
        read = torch.cat((state.gather(2, past[:, None].expand(-1, dim, -1)), new), dim=-1)
        # Of more positions than the buffer holds, the last ones stay.
        kept = new[:, :, -length:]
        written = (torch.arange(steps - kept.shape[2], steps, device=x.device) + start) % length
        state.scatter_(2, written[:, None].expand(-1, dim, -1), kept.to(state.dtype))
    if conv_state_indices is not None:
        conv_state[conv_state_indices.long()] = state
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = (read.to(dtype).unfold(2, width, 1) * weight.to(dtype)[:, None]).sum(-1)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    return (F.silu(out) if silu else out).to(x.dtype).view(x.shape)
