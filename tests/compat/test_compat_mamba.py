"""The Mamba module against lightspine's mixer of Vim, whose outputs equal those of the official code."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspine.blocks import VimMixer
from lightspine.compat.mamba import Block, Mamba
from lightspine.compat.norms import RMSNorm
from lightspine.compat.utilities import GenerationMixin, InferenceParams, load_config_hf, load_state_dict_hf
from lightspine.errors import UsageError
from support.mamba_definitions import draw
from support.reference import assert_close

DIM = 16


def rename(key: str) -> str:
    if key == "A_b_log":
        return "A_log_back"
    module, _, rest = key.partition(".")
    part, suffix = (module[:-2], "back") if module.endswith("_b") else (module, "ahead")
    shared = part in ("in_proj", "out_proj", "gamma")
    return ".".join(filter(None, ("" if shared else suffix, part, rest)))


def make(**options: Any) -> Mamba:
    module = Mamba(DIM, d_state=4, **options).double()
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.add_(0.3 * draw(*tensor.shape, seed=len(name)))
    return module


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("options", "directions", "divide"),
    [
        ({"bimamba_type": "v2", "if_divide_out": True}, "v2", True),
        ({"bimamba_type": "v2"}, "v2", False),
        ({"bimamba": True, "init_layer_scale": 0.1}, "v2", False),
        ({"bimamba_type": "v1"}, "v1", None),
        ({"bimamba_type": "none"}, "one-way", None),
        ({"bimamba": False, "init_layer_scale": 0.1}, "one-way", None),
    ],
)
def test_outputs_and_gradients_equal_those_of_vim(
    options: dict[str, Any], directions: str, divide: bool | None, fast: bool
) -> None:
    module = make(use_fast_path=fast, **options)
    scale = options.get("init_layer_scale")
    vim = VimMixer(DIM, 4, directions=directions, divide_out=divide, layer_scale=scale, layout="NLC").double()
    weights = {}
    for key, value in module.state_dict().items():
        name = rename(key)
        if directions == "v2":
            name = name.replace("A_log_back", "back.A_log")
        weights["back.D" if key == "D_b" else name] = value
    vim.load_state_dict(weights)
    results = []
    for run in (module, vim):
        x = draw(2, 7, DIM).requires_grad_()
        out = run(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad, run.in_proj.weight.grad))
    for actual, expected in zip(*results, strict=True):
        assert_close("Mamba", actual, expected, 1e-12)


def test_third_direction_scans_across_slices() -> None:
    module, x = make(bimamba_type="v3", nslices=3), draw(2, 12, DIM)
    without = make(bimamba_type="v2")
    without.load_state_dict({k: v for k, v in module.state_dict().items() if "_s" not in k})
    alone = make()
    alone.load_state_dict(
        {
            k.replace("_s", ""): v
            for k, v in module.state_dict().items()
            if "_s" in k or k in ("in_proj.weight", "out_proj.weight")
        }
    )
    order = torch.tensor([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    expected = without(x)
    expected[:, order] += alone(x[:, order])
    assert_close("out", module(x), expected, 1e-12)


def test_names_and_shapes_of_the_parameters() -> None:
    module = Mamba(DIM, bimamba_type="v2", conv_bias=False, dt_rank=3, d_conv=3)
    assert {name: tuple(t.shape) for name, t in module.named_parameters()} == {
        "A_log": (32, 16),
        "D": (32,),
        "A_b_log": (32, 16),
        "D_b": (32,),
        "in_proj.weight": (64, 16),
        "conv1d.weight": (32, 1, 3),
        "x_proj.weight": (35, 32),
        "dt_proj.weight": (32, 3),
        "dt_proj.bias": (32,),
        "conv1d_b.weight": (32, 1, 3),
        "x_proj_b.weight": (35, 32),
        "dt_proj_b.weight": (32, 3),
        "dt_proj_b.bias": (32,),
        "out_proj.weight": (16, 32),
    }


def test_initial_dt_lies_between_its_bounds_and_is_marked() -> None:
    module = Mamba(64, dt_min=0.01, dt_max=0.05, dt_init="constant", dt_scale=2.0)
    dt = nn.functional.softplus(module.dt_proj.bias)
    assert 0.0099 < dt.min() < dt.max() < 0.0501
    assert (module.dt_proj.weight == 2 * 4**-0.5).all()
    assert module.dt_proj.bias._no_reinit
    assert module.A_log._no_weight_decay
    assert module.D._no_weight_decay


@pytest.mark.parametrize("prompt", [2, 5])
def test_tokens_one_by_one_equal_the_whole_sequence(prompt: int) -> None:
    module, x = make(layer_idx=7, init_layer_scale=0.5), draw(2, 8, DIM)
    cache = InferenceParams(8, 2)
    outputs = [module(x[:, :prompt], inference_params=cache)]
    for t in range(prompt, 8):
        cache.seqlen_offset = t
        outputs.append(module(x[:, t : t + 1], inference_params=cache))
    assert list(cache.key_value_memory_dict) == [7]
    assert_close("out", torch.cat(outputs, 1), module(x), 1e-12)


def test_steps_from_an_empty_cache() -> None:
    module, x = make(), draw(2, 5, DIM)
    states = module.allocate_inference_cache(2, 5)
    steps = [module.step(x[:, t : t + 1], *states)[0] for t in range(5)]
    assert_close("out", torch.cat(steps, 1), module(x), 1e-12)


@pytest.mark.parametrize("norm", [RMSNorm, nn.LayerNorm])
def test_fused_block_equals_the_other(norm: Any) -> None:
    x, residual = draw(2, 5, DIM), draw(2, 5, DIM, seed=1)
    blocks = [Block(DIM, Mamba, norm, fused).double() for fused in (True, False)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    results = [block(x, residual) for block in blocks]
    for fused, other in zip(*results, strict=True):
        assert_close("block", fused, other, 1e-6)
    first, kept = blocks[0](x)
    assert torch.equal(kept, x)
    assert first.shape == x.shape


def test_block_keeps_the_residual_in_float32() -> None:
    block = Block(DIM, Mamba, residual_in_fp32=True).bfloat16()
    x: Tensor = draw(1, 3, DIM).bfloat16()
    assert block(x)[1].dtype == torch.float32
    assert block.allocate_inference_cache(1, 3)[0].shape == (1, 2 * DIM, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mamba(DIM, bimamba_type="v4"), "bimamba_type 'none', 'v1', 'v2', 'v3', received 'v4'"),
        (lambda: make(bimamba_type="v3")(draw(1, 7, DIM)), "a multiple of nslices=5 tokens, received 7"),
        (lambda: Mamba(DIM, dt_init="zero"), "dt_init 'random' or 'constant', received 'zero'"),
        (
            lambda: make(bimamba_type="v2")(draw(1, 3, DIM), inference_params=InferenceParams(3, 1)),
            "steps through a sequence only with bimamba_type 'none', received 'v2'",
        ),
        (lambda: make().step(draw(1, 2, DIM), None, None), r"one token, \(B, 1, C\), received \(1, 2, 16\)"),
        (
            lambda: make()(draw(1, 3, DIM), inference_params=InferenceParams(3, 1)),
            "only if it has a layer_idx",
        ),
        (
            lambda: Block(DIM, Mamba, nn.Identity, fused_add_norm=True),
            "expects LayerNorm or RMSNorm, received Identity",
        ),
        (lambda: GenerationMixin().generate(), "text generation needs mamba_ssm itself"),
    ],
)
def test_wrong_use(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_reset_of_the_cache_counts_from_zero() -> None:
    cache = InferenceParams(3, 1, seqlen_offset=2, lengths_per_sample=torch.ones(1))
    cache.reset(5, 2)
    assert (cache.max_seqlen, cache.max_batch_size, cache.seqlen_offset) == (5, 2, 0)
    assert cache.lengths_per_sample is not None
    assert not cache.lengths_per_sample.any()


def test_files_of_a_folder_are_read_without_running_code(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"d_model": 3}')
    torch.save({"weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert load_config_hf(str(tmp_path)) == {"d_model": 3}
    assert load_state_dict_hf(str(tmp_path), dtype=torch.float64)["weight"].dtype == torch.float64
    torch.save({"weight": SimpleNamespace()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_state_dict_hf(str(tmp_path))
