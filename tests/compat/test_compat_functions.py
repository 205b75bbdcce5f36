"""The functions of mamba_ssm and causal_conv1d against plain definitions in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightspine.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from lightspine.compat.norms import RMSNorm, layer_norm_fn, rms_norm_fn
from lightspine.compat.selective_scan import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    selective_scan_fn,
    selective_scan_ref,
)
from lightspine.compat.state_update import selective_state_update
from lightspine.errors import UsageError
from support.mamba_definitions import (
    define_convolution,
    define_inner,
    define_scan,
    draw,
    inner_arguments,
    values_and_gradients,
)
from support.reference import assert_close

BATCH, DIM, LENGTH, STATES = 2, 6, 19, 5
PROJECTIONS = {
    "shared": ((BATCH, STATES, LENGTH),) * 2,
    "grouped": ((BATCH, 3, STATES, LENGTH),) * 2,
    "constant": ((DIM, STATES),) * 2,
    "constant B, grouped C": ((DIM, STATES), (BATCH, 2, STATES, LENGTH)),
    "shared B, constant C": ((BATCH, STATES, LENGTH), (DIM, STATES)),
}


def scan_tensors(projections: str = "shared") -> dict[str, Tensor]:
    shape_B, shape_C = PROJECTIONS[projections]
    return {
        "u": draw(BATCH, DIM, LENGTH),
        "delta": 0.5 * draw(BATCH, DIM, LENGTH, seed=1),
        "A": -torch.exp(0.5 * draw(DIM, STATES)),
        "B": draw(*shape_B, seed=2),
        "C": draw(*shape_C, seed=3),
        "D": draw(DIM),
        "z": draw(BATCH, DIM, LENGTH, seed=4),
        "delta_bias": draw(DIM, seed=5) - 1,
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert_close(name, value, expected[name], tolerance)


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("projections", PROJECTIONS)
def test_scan_and_gradients(function: Any, projections: str) -> None:
    tensors = scan_tensors(projections)
    actual = values_and_gradients(function, tensors, delta_softplus=True)
    assert_same(actual, values_and_gradients(define_scan, tensors, delta_softplus=True), 1e-12)


def test_scan_without_optional_tensors() -> None:
    tensors = {name: scan_tensors()[name] for name in ("u", "delta", "A", "B", "C")}
    tensors["delta"] = tensors["delta"].abs()
    assert_same(
        values_and_gradients(selective_scan_fn, tensors), values_and_gradients(define_scan, tensors), 1e-12
    )


def test_scan_of_bfloat16_returns_bfloat16_and_a_float32_state_without_gradient() -> None:
    tensors = {
        name: t.to(torch.float32 if name in ("A", "D", "delta_bias") else torch.bfloat16).requires_grad_()
        for name, t in scan_tensors().items()
    }
    out, state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (out.requires_grad, state.requires_grad) == (True, False)
    expected = define_scan(**{name: t.detach().double() for name, t in tensors.items()}, delta_softplus=True)
    assert_close("out", out, expected, 4e-3)


def test_last_state_is_that_after_the_last_position() -> None:
    tensors = scan_tensors()
    _, state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    # C reads one state at a time.
    tensors |= {"D": torch.zeros(DIM), "z": None}
    for n in range(STATES):
        tensors["C"] = torch.zeros(BATCH, STATES, LENGTH).double()
        tensors["C"][:, n] = 1
        assert_close(f"state {n}", state[..., n], define_scan(**tensors, delta_softplus=True)[..., -1], 1e-12)


def test_output_can_be_viewed_like_the_input() -> None:
    tensors = scan_tensors()
    assert selective_scan_fn(**tensors, delta_softplus=True).is_contiguous()
    tokens = {
        name: t.transpose(1, 2).contiguous().transpose(1, 2) if t.shape == (BATCH, DIM, LENGTH) else t
        for name, t in tensors.items()
    }
    assert selective_scan_fn(**tokens, delta_softplus=True).transpose(1, 2).is_contiguous()


def out_projection() -> dict[str, Tensor]:
    return {"out_proj_weight": draw(5, 6), "out_proj_bias": draw(5)}


def define_projected(out_proj_weight: Tensor, out_proj_bias: Tensor, **tensors: Tensor) -> Tensor:
    return F.linear(define_inner(**tensors).transpose(1, 2), out_proj_weight, out_proj_bias)


GIVEN = {
    "projected": {},
    "given B": {"B": draw(2, 3, 11)},
    "constant C": {"C": draw(6, 3)},
    "both given": {"B": draw(2, 2, 3, 11), "C": draw(2, 2, 3, 11, seed=1)},
}


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("given", GIVEN)
def test_mamba_inner_and_gradients(given: str, level: int) -> None:
    tensors = inner_arguments() | GIVEN[given] | out_projection()
    rows = 2 + 3 * (2 - len(GIVEN[given]))
    tensors["x_proj_weight"] = tensors["x_proj_weight"][:rows]
    expected = values_and_gradients(define_projected, tensors)
    assert_same(values_and_gradients(mamba_inner_fn, tensors, checkpoint_lvl=level), expected, 1e-12)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_inner_without_projection_and_gradients(width: int) -> None:
    tensors = inner_arguments(length=3, width=width)
    expected = values_and_gradients(define_inner, tensors)
    assert_same(values_and_gradients(mamba_inner_fn_no_out_proj, tensors), expected, 1e-12)


def test_bidirectional_inner_and_gradients() -> None:
    tensors = inner_arguments() | out_projection() | {"A_b": -torch.exp(draw(6, 3, seed=7))}
    expected = values_and_gradients(define_projected, tensors)
    assert_same(values_and_gradients(bimamba_inner_fn, tensors), expected, 1e-12)


def test_inner_adds_biases_and_norms_to_the_projections() -> None:
    tensors = inner_arguments() | out_projection()
    more = {"B_proj_bias": draw(3), "C_proj_bias": draw(3, seed=1), "b_rms_weight": draw(3, seed=2)}
    more |= {"c_rms_weight": draw(3, seed=3), "dt_rms_weight": draw(6, seed=3)}
    x, z = tensors["xz"].chunk(2, dim=1)
    u = define_convolution(x, tensors["conv1d_weight"][:, 0], tensors["conv1d_bias"], silu=True)
    dt, B, C = (tensors["x_proj_weight"] @ u).split([2, 3, 3], dim=1)

    def norm(t: Tensor, weight: Tensor) -> Tensor:
        return weight[:, None] * t / (t.square().mean(1, keepdim=True) + 1e-3).sqrt()

    y = define_scan(
        u,
        norm(tensors["delta_proj_weight"] @ dt, more["dt_rms_weight"]),
        tensors["A"],
        norm(B + more["B_proj_bias"][:, None], more["b_rms_weight"]),
        norm(C + more["C_proj_bias"][:, None], more["c_rms_weight"]),
        tensors["D"],
        z,
        tensors["delta_bias"],
        True,
    )
    expected = F.linear(y.transpose(1, 2), tensors["out_proj_weight"], tensors["out_proj_bias"])
    assert_close("out", mamba_inner_fn(**tensors, **more, b_c_dt_rms_eps=1e-3), expected, 1e-12)


def test_autocast_casts_the_projections_and_keeps_the_scan_in_float32() -> None:
    tensors = {name: t.float() for name, t in (inner_arguments() | out_projection()).items()}
    # dt is so small that a scan in bfloat16 would lose the input.
    tensors["delta_bias"] -= 6
    rounded = {
        name: t.bfloat16().double() if name.endswith("proj_weight") else t.double()
        for name, t in tensors.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**tensors)
    assert out.dtype == torch.bfloat16
    assert_close("out", out, define_projected(**rounded), 8e-3)


def test_autocast_does_not_reach_the_convolution() -> None:
    x, weight = draw(2, 3, 9).float(), draw(3, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_conv1d_fn(x, weight, activation="silu")
    assert_close("out", out, define_convolution(x.double(), weight.double(), silu=True), 1e-6)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_convolution_and_gradients(width: int, activation: str | None) -> None:
    tensors = {"x": draw(2, 5, 7), "weight": draw(5, width), "bias": draw(5)}
    expected = values_and_gradients(define_convolution, tensors, silu=activation is not None)
    assert_same(values_and_gradients(causal_conv1d_fn, tensors, activation=activation), expected, 1e-12)


def test_convolution_of_half_precision_input_with_float32_weights() -> None:
    x, weight, bias = draw(2, 3, 9).bfloat16(), draw(3, 4).float(), draw(3).float()
    # The fourth argument was the activation before version 1.2.
    out = causal_conv1d_fn(x, weight, bias, "silu")
    assert out.dtype == torch.bfloat16
    assert_close("out", out, define_convolution(x.double(), weight.double(), bias.double(), True), 4e-3)


@pytest.mark.parametrize("length", [2, 8])
def test_convolution_continues_from_its_final_states(length: int) -> None:
    x, weight = draw(2, 3, 4 + length), draw(3, 4)
    first, states = causal_conv1d_fn(x[..., :4], weight, return_final_states=True)
    kept = torch.empty(2, 3, 3).double()
    second, returned = causal_conv1d_fn(
        x[..., 4:], weight, initial_states=states, return_final_states=True, final_states_out=kept
    )
    assert returned is kept
    assert torch.equal(kept, x[..., -3:])
    assert_close("out", torch.cat((first, second), -1), define_convolution(x, weight), 1e-12)


def test_final_states_of_a_short_sequence_start_with_zeros() -> None:
    _, states = causal_conv1d_fn(torch.ones(1, 1, 2), torch.ones(1, 4), return_final_states=True)
    assert states.tolist() == [[[0, 1, 1]]]


def test_gradients_of_initial_states() -> None:
    tensors = {"x": draw(2, 3, 5), "weight": draw(3, 4), "initial_states": draw(2, 3, 3, seed=1)}

    def define(x: Tensor, weight: Tensor, initial_states: Tensor) -> Tensor:
        return define_convolution(torch.cat((initial_states, x), -1), weight)[..., 3:]

    assert_same(values_and_gradients(causal_conv1d_fn, tensors), values_and_gradients(define, tensors), 1e-12)


def test_convolution_does_not_cross_from_one_sequence_to_the_next() -> None:
    tensors = {"x": draw(2, 3, 9), "weight": draw(3, 4), "bias": draw(3)}
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)

    def define(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = [
            torch.cat([define_convolution(part[None], weight, bias, True) for part in row.split(parts, 1)], 2)
            for row, parts in zip(x, ([4, 5], [1, 6, 2]), strict=True)
        ]
        return torch.cat(rows)

    actual = values_and_gradients(causal_conv1d_fn, tensors, seq_idx=seq_idx, activation="silu")
    assert_same(actual, values_and_gradients(define, tensors), 1e-12)


@pytest.mark.parametrize("kept", [3, 5])
def test_steps_of_the_convolution_change_the_state_in_place(kept: int) -> None:
    x, weight, bias, state = draw(2, 3, 7), draw(3, 4), draw(3), torch.zeros(2, 3, kept).double()
    steps = [causal_conv1d_update(x[..., t], state, weight, bias, "silu") for t in range(5)]
    steps += [*causal_conv1d_update(x[..., 5:], state, weight, bias, "silu").unbind(-1)]
    assert_close("out", torch.stack(steps, -1), define_convolution(x, weight, bias, True), 1e-12)
    assert torch.equal(state, x[..., -kept:])


def test_steps_of_the_convolution_in_a_ring_buffer() -> None:
    x, weight, state = draw(2, 3, 11), draw(3, 4), torch.zeros(2, 3, 5).double()
    seen, steps = torch.zeros(2, dtype=torch.int32), []
    for part in x.split(2, dim=-1):
        steps.append(causal_conv1d_update(part, state, weight, cache_seqlens=seen))
        seen += part.shape[2]
    assert_close("out", torch.cat(steps, -1), define_convolution(x, weight), 1e-12)


def test_steps_of_the_convolution_change_only_the_chosen_rows() -> None:
    x, weight, states = draw(2, 3), draw(3, 4), draw(4, 3, 3)
    before, rows = states.clone(), torch.tensor([2, 0], dtype=torch.int32)
    out = causal_conv1d_update(x, states, weight, conv_state_indices=rows)
    joined = torch.cat((before[rows.long()], x[..., None]), -1)
    assert_close("out", out, (joined * weight).sum(-1), 1e-12)
    assert torch.equal(states[rows.long()], joined[..., 1:])
    assert torch.equal(states[[1, 3]], before[[1, 3]])


def test_steps_of_the_scan_equal_the_scan() -> None:
    tensors = scan_tensors()
    state = torch.zeros(BATCH, DIM, STATES).double()
    steps = [
        selective_state_update(
            state,
            tensors["u"][..., t],
            tensors["delta"][..., t],
            tensors["A"],
            tensors["B"][..., t],
            tensors["C"][..., t],
            tensors["D"],
            tensors["z"][..., t],
            tensors["delta_bias"],
            True,
        )
        for t in range(LENGTH)
    ]
    assert_close("out", torch.stack(steps, -1), define_scan(**tensors, delta_softplus=True), 1e-12)


def test_a_step_of_the_scan_with_heads_and_groups() -> None:
    x, dt, A = draw(2, 4, 3), draw(2, 4, 3, seed=1).abs(), -draw(4, 3, 5).abs()
    B, C, states = draw(2, 2, 5), draw(2, 2, 5, seed=1), draw(3, 4, 3, 5)
    before, rows = states.clone(), torch.tensor([2, 0])
    out = selective_state_update(states, x, dt, A, B, C, state_batch_indices=rows)
    for head in range(4):
        h = torch.exp(dt[:, head, :, None] * A[head]) * before[rows, head]
        h = h + (dt * x)[:, head, :, None] * B[:, head // 2, None]
        assert_close("state", states[rows, head], h, 1e-12)
        assert_close("out", out[:, head], (h * C[:, head // 2, None]).sum(-1), 1e-12)
    assert torch.equal(states[1], before[1])


def define_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, x1: Tensor, rms: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual + x1
    centered = total if rms else total - total.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * weight + bias, total


@pytest.mark.parametrize(("function", "rms"), [(layer_norm_fn, False), (rms_norm_fn, True)])
def test_norms_and_gradients(function: Any, rms: bool) -> None:
    tensors = {"x": draw(2, 3, 7), "weight": draw(7), "bias": draw(7, seed=1)}
    tensors |= {"residual": draw(2, 3, 7, seed=2), "x1": draw(2, 3, 7, seed=3)}

    def joined(function: Any, **options: Any) -> Any:
        return lambda **leaves: torch.cat(function(**leaves, **options))

    expected = values_and_gradients(joined(define_norm, rms=rms), tensors)
    assert_same(values_and_gradients(joined(function, eps=1e-5, prenorm=True), tensors), expected, 1e-12)


@pytest.mark.parametrize(
    ("residual", "in_fp32", "expected"),
    [
        (None, False, torch.bfloat16),
        (None, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
    ],
)
def test_dtypes_of_norm_and_residual(
    residual: torch.dtype | None, in_fp32: bool, expected: torch.dtype
) -> None:
    x = draw(3, 8).bfloat16()
    added = None if residual is None else draw(3, 8, seed=1).to(residual)
    out, total = RMSNorm(8)(x, added, prenorm=True, residual_in_fp32=in_fp32)
    assert (out.dtype, total.dtype) == (torch.bfloat16, expected)


def test_norm_with_row_scale_and_a_second_weight() -> None:
    x, weight, weight1, scale = draw(2, 3, 7), draw(7), draw(7, seed=1), torch.tensor([[0.0, 1, 2]] * 2)
    first, second = rms_norm_fn(x, weight, None, weight1=weight1, rowscale=scale)
    scaled = x * scale[..., None]
    for name, out, factor in (("first", first, weight), ("second", second, weight1)):
        assert_close(name, out, F.rms_norm(scaled, (7,), factor, 1e-6), 1e-12)


def test_norm_returns_the_dropout_mask() -> None:
    x = torch.ones(50, 8)
    _, total, mask, mask1 = layer_norm_fn(
        x, torch.ones(8), None, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert mask1 is None
    assert 0.6 < mask.float().mean() < 0.9
    assert torch.equal(total, mask / 0.75)


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict({name: t.float() for name, t in inner_arguments().items()})
        self.norm = RMSNorm(6)

    def forward(self, xz: Tensor) -> Tensor:
        tensors = dict(self.tensors.items()) | {"xz": xz}
        y = mamba_inner_fn_no_out_proj(**tensors)
        y = y + selective_scan_fn(y, y, tensors["A"], y[:, :3], y[:, 3:], delta_softplus=True)
        y = causal_conv1d_fn(y, tensors["conv1d_weight"][:, 0], activation="silu")
        return self.norm(y.transpose(1, 2), residual=xz[:, :6].transpose(1, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_model_is_one_graph_with_equal_gradients() -> None:
    model, xz = TinyModel(), inner_arguments()["xz"].float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        leaf = xz.clone().requires_grad_()
        run(leaf).square().sum().backward()
        results.append(leaf.grad)
    assert_close("gradient", results[1], results[0], 1e-5)


COMPLEX = torch.complex(-torch.ones(6, 3), torch.ones(6, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda t: selective_scan_fn(t["xz"], t["xz"], COMPLEX, t["xz"], t["xz"]),
        lambda t: selective_scan_ref(t["xz"], t["xz"], COMPLEX, t["xz"], t["xz"]),
        lambda t: mamba_inner_fn_no_out_proj(**t | {"A": COMPLEX}),
        lambda t: mamba_inner_fn(**t | {"A": COMPLEX} | out_projection()),
        lambda t: bimamba_inner_fn(**t | {"A_b": COMPLEX} | out_projection()),
        lambda t: selective_state_update(t["xz"], t["D"], t["D"], COMPLEX, t["D"], t["D"]),
    ],
)
def test_complex_state_matrix_is_refused(call: Any) -> None:
    with pytest.raises(UsageError, match="expects a real state matrix A, received complex64"):
        call(inner_arguments())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"xz": draw(2, 11, 5)}, r"expects xz of shape \(B, 2 D, L\), received \(2, 11, 5\)"),
        (
            {"conv1d_weight": draw(6, 4)},
            r"conv1d_weight of shape \(D, 1, W\) = \(6, 1, 4\), received \(6, 4\)",
        ),
        (
            {"x_proj_weight": draw(9, 6)},
            r"x_proj_weight of shape \(R \+ 2 N, D\) = \(8, 6\), received \(9, 6\)",
        ),
        ({"delta_proj_weight": draw(5, 2)}, r"delta_proj_weight of shape \(D, R\) = \(6, 2\)"),
        ({"A": draw(6)}, r"A of shape \(D, N\), received \(6,\)"),
        ({"checkpoint_lvl": 2}, "expects checkpoint_lvl 0 or 1, received 2"),
        ({"D": draw(5)}, r"expects D of shape \(6,\), received \(5,\)"),
        ({"conv1d_bias": draw(5)}, r"expects bias of shape \(1, 6\), received \(1, 5\)"),
    ],
)
def test_wrong_arguments_of_inner_functions(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mamba_inner_fn_no_out_proj(**inner_arguments() | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: causal_conv1d_fn(x[0], w), r"x of shape \(B, D, L\), received \(3, 9\)"),
        (lambda x, w: causal_conv1d_fn(x, w[:2]), r"weight of shape \(D=3, W\), received \(2, 4\)"),
        (lambda x, w: causal_conv1d_fn(x, w, activation="relu"), "activation None, 'silu' or 'swish'"),
        (lambda x, w: causal_conv1d_fn(x, w, w), r"bias of shape \(D,\) = \(3,\), received \(3, 4\)"),
        (
            lambda x, w: causal_conv1d_fn(x, w, seq_idx=x[:, 0], return_final_states=True),
            "no initial_states and no return_final_states together with seq_idx",
        ),
        (
            lambda x, w: causal_conv1d_update(x[..., 0], x[..., :2], w),
            r"conv_state of shape \(B=2, D=3, T\) with T of at least 3, received \(2, 3, 2\)",
        ),
        (
            lambda x, w: selective_state_update(x[0], x[..., 0], x[..., 0], w, w, w),
            r"state of shape \(B, D, N\) or \(B, H, D, N\), received \(3, 9\)",
        ),
        (
            lambda x, w: selective_state_update(x, x[..., 0], x[..., 0], w, w, w),
            r"A of shape \(H, D, N\) = \(1, 3, 9\), received \(1, 3, 4\)",
        ),
        (lambda x, w: rms_norm_fn(x, w[0], None), r"weight of shape \(C,\) = \(9,\), received \(4,\)"),
        (
            lambda x, w: rms_norm_fn(x, w[0], None, None, 1e-5),
            "expects a tensor as x1, its fifth argument",
        ),
        (
            lambda x, w: layer_norm_fn(x, w[0], None, x1=x, rowscale=x[..., 0]),
            "layer_norm_fn expects rowscale or x1, received both",
        ),
    ],
)
def test_wrong_arguments_of_other_functions(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(draw(2, 3, 9), draw(3, 4))
