"""Selective scan and cross scan on compiled kernels: both become one grouped scan of `cpu/` or `triton/`.

Tensors are read and written in place, through strides. Creating a view takes about as long as a
small scan, so strides are passed instead of views where possible.
"""

from types import ModuleType

import torch
from torch import Tensor

from lightspine.ops.inputs import (
    CrossScanInputs,
    GroupedInputs,
    SelectiveScanInputs,
    Strided,
    check_directions,
    positions_innermost,
    state_dtype,
)
from lightspine.ops.scan_orders import scan_order


class KernelScan:
    """Forward and backward of both scans on one set of kernels; inputs are checked by the caller.

    Args:
        launch: `lightspine.ops.cpu.launch` or `lightspine.ops.triton.launch`.
    """

    def __init__(self, launch: ModuleType) -> None:
        self._forward, self._backward = launch.grouped_scan, launch.grouped_scan_backward
        self._in_place: bool = launch.READS_SEQUENCES

    def selective_scan(
        self, inputs: SelectiveScanInputs, delta_softplus: bool, reverse: bool, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output (B, D, L), the last state (B, D, N) and the saved states.

        The output has the memory layout of u where the kernels read it in place, else channels innermost.
        """
        grouped = _group_sequence(inputs, delta_softplus, reverse, self._in_place)
        out = self._empty(inputs.u, inputs.u.dtype)
        state, saved_states = self._forward(grouped, self._tokens(out, grouped), save_states)
        state = state.transpose(2, 3).contiguous().view(out.shape[0], *inputs.A.shape)
        return out, state, saved_states

    def selective_scan_backward(
        self,
        grad_out: Tensor,
        grad_state: Tensor,
        inputs: SelectiveScanInputs,
        saved_states: Tensor,
        delta_softplus: bool,
        reverse: bool,
    ) -> SelectiveScanInputs:
        """Return the gradients of all inputs in their shapes and dtypes.

        Those of u, delta and z have the memory layouts of these where the kernels read them in place, else
        channels innermost.
        """
        u, delta, A, B, C, D, z, delta_bias = inputs
        grouped = _group_sequence(inputs, delta_softplus, reverse, self._in_place)
        batch, _, groups, dim, states = grouped.sizes
        grad_u, grad_delta = (
            self._empty(t, read.tensor.dtype) for t, read in ((u, grouped.x), (delta, grouped.delta))
        )
        grad_z = None if z is None or grouped.z is None else self._empty(z, grouped.z.tensor.dtype)
        grads = self._backward(
            self._tokens(grad_out, grouped),
            grad_state.to(grouped.dtype).view(batch, groups, dim, states).transpose(2, 3).contiguous(),
            grouped,
            saved_states,
            self._tokens(grad_u, grouped),
            self._tokens(grad_delta, grouped),
            None if grad_z is None else self._tokens(grad_z, grouped),
        )
        return SelectiveScanInputs(
            grad_u,
            grad_delta.to(delta.dtype),
            grads.A.contiguous().view(A.shape).to(A.dtype),
            grads.B.permute(0, 2, 3, 1).to(B.dtype),
            grads.C.permute(0, 2, 3, 1).to(C.dtype),
            None if D is None else grads.D.view(D.shape).to(D.dtype),
            None if grad_z is None or z is None else grad_z.to(z.dtype),
            None if delta_bias is None else grads.delta_bias.view(delta_bias.shape).to(delta_bias.dtype),
        )

    def _empty(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Allocate a result in the shape of a sequence (B, D, L), and in its layout or as tokens."""
        batch, dim, length = t.shape
        if self._in_place and positions_innermost(t):
            return torch.empty(batch, dim, length, dtype=dtype, device=t.device)
        return torch.empty(batch, length, dim, dtype=dtype, device=t.device).transpose(1, 2)

    def _tokens(self, t: Tensor, inputs: GroupedInputs) -> Strided:
        return _as_tokens(t, inputs.sizes[3], inputs.dtype, self._in_place)

    def bidirectional_scan(self, inputs: SelectiveScanInputs, delta_softplus: bool) -> Tensor:
        """Return the sum of both directions, (B, D, L), channels innermost; Triton kernels only.

        Args:
            inputs: of both directions, each a group of D channels; z is (B, D, L) and shared.
            delta_softplus: apply softplus to dt.
        """
        grouped = _group_directions(inputs, delta_softplus)
        out = self._empty(inputs.u, inputs.u.dtype)
        self._forward(grouped, self._tokens(out, grouped), False)
        forward, backward = out.chunk(2, dim=1)
        return forward + backward

    def bidirectional_scan_backward(
        self, grad_out: Tensor, inputs: SelectiveScanInputs, delta_softplus: bool
    ) -> SelectiveScanInputs:
        """Return the gradients of all inputs in their shapes and dtypes, channels innermost in memory."""
        u, delta, A, B, C, D, z, delta_bias = inputs
        grouped = _group_directions(inputs, delta_softplus)
        grad_u, grad_delta = (
            self._empty(t, read.tensor.dtype) for t, read in ((u, grouped.x), (delta, grouped.delta))
        )
        # One gradient of the shared z per direction.
        grad_z = None if grouped.z is None else self._empty(u, grouped.z.tensor.dtype)
        grads = self._backward(
            _as_tokens(grad_out, grouped.sizes[3], grouped.dtype, False)._replace(group=0),
            None,
            grouped,
            grad_u.new_empty(0),
            self._tokens(grad_u, grouped),
            self._tokens(grad_delta, grouped),
            None if grad_z is None else self._tokens(grad_z, grouped),
        )
        if grad_z is not None:
            forward, backward = grad_z.chunk(2, dim=1)
            grad_z = forward + backward
        return SelectiveScanInputs(
            grad_u,
            grad_delta.to(delta.dtype),
            grads.A.contiguous().view(A.shape).to(A.dtype),
            grads.B.permute(0, 2, 3, 1).to(B.dtype),
            grads.C.permute(0, 2, 3, 1).to(C.dtype),
            None if D is None else grads.D.view(D.shape).to(D.dtype),
            None if grad_z is None or z is None else grad_z.to(z.dtype),
            None if delta_bias is None else grads.delta_bias.view(delta_bias.shape).to(delta_bias.dtype),
        )

    def cross_scan(
        self, inputs: CrossScanInputs, delta_softplus: bool, order: str, save_states: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the sum over the directions, (B, H, W, D), in the dtype of the state, and saved states."""
        return self._scan_map(_group_map(inputs, delta_softplus, order), inputs.x, save_states)

    def projected_cross_scan(self, inputs: CrossScanInputs, dt_weight: Tensor, order: str) -> Tensor:
        """Return the sum over the directions, (B, H, W, D), in the dtype of the state; CPU kernels only.

        Args:
            inputs: `delta` is (B, H, W, K, R).
            dt_weight: projects `delta` to dt, (K, R, D).
            order: registered scan order.
        """
        grouped = _group_map(inputs, True, order)
        grouped = grouped._replace(dt_weight=dt_weight.to(grouped.dtype).contiguous())
        return self._scan_map(grouped, inputs.x, False)[0]

    def _scan_map(self, grouped: GroupedInputs, x: Tensor, save_states: bool) -> tuple[Tensor, Tensor]:
        out = torch.empty(x.shape, dtype=grouped.dtype, device=x.device)
        _, saved_states = self._forward(grouped, _shared_map(out, grouped.dtype), save_states)
        return out, saved_states

    def cross_scan_backward(
        self,
        grad_out: Tensor,
        inputs: CrossScanInputs,
        saved_states: Tensor,
        delta_softplus: bool,
        order: str,
    ) -> CrossScanInputs:
        """Return the gradients of all inputs in their shapes and dtypes, contiguous."""
        x, delta, A, B, C, D, delta_bias = inputs
        grouped = _group_map(inputs, delta_softplus, order)
        # The directions are summed in the dtype of the state and rounded once.
        grad_x = torch.empty(x.shape, dtype=grouped.dtype, device=x.device)
        grad_delta = torch.empty(delta.shape, dtype=grouped.delta.tensor.dtype, device=x.device)
        grads = self._backward(
            _shared_map(grad_out, grouped.dtype),
            None,
            grouped,
            saved_states,
            _shared_map(grad_x, grouped.dtype),
            _map_per_direction(grad_delta),
            None,
        )
        return CrossScanInputs(
            grad_x.to(x.dtype),
            grad_delta.to(delta.dtype),
            grads.A.contiguous().to(A.dtype),
            grads.B.view(B.shape).to(B.dtype),
            grads.C.view(C.shape).to(C.dtype),
            None if D is None else grads.D.to(D.dtype),
            None if delta_bias is None else grads.delta_bias.to(delta_bias.dtype),
        )


def _group_sequence(
    inputs: SelectiveScanInputs, delta_softplus: bool, reverse: bool, in_place: bool
) -> GroupedInputs:
    u, delta, A, B, C, D, z, delta_bias = inputs
    batch, dim, length = u.shape
    groups, states = B.shape[1], B.shape[2]
    channels, dtype = dim // groups, state_dtype(u.dtype)
    return GroupedInputs(
        (batch, length, groups, channels, states),
        dtype,
        _as_tokens(u, channels, dtype, in_place),
        _as_tokens(delta, channels, dtype, in_place),
        A,
        _as_projection(B),
        _as_projection(C),
        D,
        None if z is None else _as_tokens(z, channels, dtype, in_place),
        delta_bias,
        delta_softplus,
        -1 if reverse else 0,
        None,
    )


def _group_directions(inputs: SelectiveScanInputs, delta_softplus: bool) -> GroupedInputs:
    """Group 0 scans forward, group 1 from the last position to the first; both read the same z."""
    grouped = _group_sequence(inputs, delta_softplus, False, False)
    z = None if grouped.z is None else grouped.z._replace(group=0)
    return grouped._replace(z=z, reversed_groups=0b10)


def _group_map(inputs: CrossScanInputs, delta_softplus: bool, order: str) -> GroupedInputs:
    x, delta, A, B, C, D, delta_bias = inputs
    batch, height, width, dim = x.shape
    groups, _, states = A.shape
    pixels = scan_order(order, height, width)
    check_directions(groups, pixels.shape[0], order)
    dtype = state_dtype(x.dtype)
    return GroupedInputs(
        (batch, height * width, groups, dim, states),
        dtype,
        _shared_map(x, dtype),
        _map_per_direction(_channels_contiguous(_readable(delta, dtype))),
        A,
        _map_per_direction(B),
        _map_per_direction(C),
        D,
        None,
        delta_bias,
        delta_softplus,
        0,
        pixels,
    )


def _as_tokens(t: Tensor, channels: int, dtype: torch.dtype, in_place: bool) -> Strided:
    """(B, D, L) as (B, L, K, D / K) with contiguous channels; copied unless it is stored as tokens.

    With `in_place`, contiguous positions are not copied either.
    """
    t = _readable(t, dtype)
    batch, channel, position = t.stride()
    if in_place and positions_innermost(t):
        return Strided(t, batch, position, channels * channel, channel)
    if channel != 1 and t.shape[1] > 1:
        t = t.transpose(1, 2).contiguous()
        batch, position, channel = t.stride()
    return Strided(t, batch, position, channels)


def _as_projection(t: Tensor) -> Strided:
    """(B, K, N, L) as (B, L, K, N)."""
    batch, group, state, position = t.stride()
    return Strided(t, batch, position, group, state)


def _shared_map(t: Tensor, dtype: torch.dtype) -> Strided:
    """(B, H, W, D) as (B, L, K, D) that all groups share, channels contiguous."""
    t = _flattenable(_channels_contiguous(_readable(t, dtype)))
    return Strided(t, t.stride(0), _pixel_stride(t), 0)


def _map_per_direction(t: Tensor) -> Strided:
    """(B, H, W, K, X) as (B, L, K, X)."""
    t = _flattenable(t)
    return Strided(t, t.stride(0), _pixel_stride(t), t.stride(3), t.stride(4))


def _readable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert `t` if only one of it and the state has 64 bits; kernels read all other mixtures of dtypes."""
    return t if (t.dtype == torch.float64) == (dtype == torch.float64) else t.to(dtype)


def _channels_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _flattenable(t: Tensor) -> Tensor:
    """Return `t`, copied unless one stride leads from each pixel to the next, row by row."""
    height, width = t.shape[1:3]
    return t if height == 1 or width == 1 or t.stride(1) == width * t.stride(2) else t.contiguous()


def _pixel_stride(t: Tensor) -> int:
    return t.stride(2 if t.shape[2] > 1 else 1)
