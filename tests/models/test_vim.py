"""Vim against reference values of the official code."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor, get_graph_node_names
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine.models.vim import checkpoint_filter_fn
from support.reference import assert_close, figure_images, fill_checkpoint, load_figure_model, read_figure

slow = pytest.mark.slow
FIGURES = [
    ("vim_tiny", "vim_tiny", {}),
    ("vim_tiny_head_cls", "vim_tiny", {"class_token": "head"}),
    ("vim_tiny_mean_pool", "vim_tiny", {"class_token": "none"}),
    ("vim_tiny_last_token", "vim_tiny", {"class_token": "none", "global_pool": "last"}),
    ("vim_tiny_layer_norm", "vim_tiny", {"norm": "layer"}),
    ("vim_tiny_layer_scale", "vim_tiny", {"layer_scale": 0.1}),
    ("vim_tiny_middle_cls_no_division", "vim_tiny", {"divide_out": False}),
    ("vim_tiny_no_pos_embed", "vim_tiny", {"pos_embed": False}),
    ("vim_tiny_uni", "vim_tiny", {"directions": "one-way"}),
    ("vim_tiny_bidirectional_layers", "vim_tiny", {"directions": "layer-pairs"}),
    pytest.param(("vim_tiny_stride8", "vim_tiny_plus", {}), marks=slow),
    pytest.param(("vim_small", "vim_small", {}), marks=slow),
    pytest.param(("vim_base", "vim_base", {}), marks=slow),
]


def small_vim(**options: Any) -> nn.Module:
    settings = {"dim": 32, "depth": 4, "num_classes": 10, "img_size": 64} | options
    return lightspine.create_model("vim_tiny", **settings).eval()


class Run:
    """A float64 forward pass of a reference model, with its layer outputs."""

    def __init__(self, figure_name: str, model_name: str, options: dict[str, Any], folder: Path):
        self.figure = read_figure(f"vim/{figure_name}")
        self.model = load_figure_model(model_name, self.figure, folder, **options)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.streams: list[Tensor] = []
        self.mixed: list[Tensor] = []
        pairs = options.get("directions") == "layer-pairs"
        for block in self.model.blocks:
            for layer in (block.ahead, block.back) if pairs else (block,):
                # The official second layer of a pair works on the flipped sequence.
                flipped = pairs and layer is block.back
                layer.register_forward_hook(partial(self.keep, self.streams, flipped))
                layer.mixer.register_forward_hook(partial(self.keep, self.mixed, flipped))
        with torch.inference_mode():
            self.model.double()
            tokens = self.model.forward_features(figure_images(self.figure))
            self.logits = self.model.forward_head(tokens)
            self.pooled = self.model.forward_head(tokens, pre_logits=True)[0]

    @staticmethod
    def keep(kept: list[Tensor], flipped: bool, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        kept.append(out[0].flip(0) if flipped else out[0])


@pytest.fixture(params=FIGURES, ids=lambda case: case[0], scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(*request.param, tmp_path_factory.mktemp("figure"))


def assert_feature(name: str, actual: Tensor, figure: dict[str, Any]) -> None:
    assert list(actual.shape) == figure["shape"]
    flat = actual.flatten()
    # Values are printed with 8 digits: a relative rounding error of up to 5e-8.
    expected = torch.tensor(figure["values"], dtype=torch.float64)
    torch.testing.assert_close(flat[:: flat.numel() // 8][:8], expected, rtol=6e-8, atol=0)
    assert_close(f"{name} (std)", flat.std(correction=0), figure["std"], 1e-7)


def test_parameter_count_equals_official(run: Run) -> None:
    assert run.parameters == run.figure["parameters"]


def test_logits_equal_official_in_float64(run: Run) -> None:
    assert_close("logits", run.logits, run.figure["logits"], 1e-7)


def test_pooled_features_equal_official(run: Run) -> None:
    assert_feature("pooled", run.pooled, run.figure["features"]["pooled"])


@pytest.mark.parametrize("layer", [6, 12, 18, 24])
def test_residual_stream_equals_official(run: Run, layer: int) -> None:
    assert_feature("stream", run.streams[layer - 1], run.figure["features"][f"layer{layer}_stream"])


@pytest.mark.parametrize("layer", [6, 12, 18, 24])
def test_mixer_output_equals_official(run: Run, layer: int) -> None:
    assert_feature("mixer", run.mixed[layer - 1], run.figure["features"][f"layer{layer}_mixer"])


@pytest.mark.parametrize(
    ("figure_name", "model_name"),
    [
        ("vim_tiny", "vim_tiny"),
        pytest.param("vim_tiny_stride8", "vim_tiny_plus", marks=slow),
        pytest.param("vim_small", "vim_small", marks=slow),
        pytest.param("vim_base", "vim_base", marks=slow),
    ],
)
def test_logits_equal_official_in_float32(figure_name: str, model_name: str, tmp_path: Path) -> None:
    figure = read_figure(f"vim/{figure_name}")
    model = load_figure_model(model_name, figure, tmp_path)
    with torch.inference_mode():
        logits = model(figure_images(figure, torch.float32))
    assert_close("logits", logits, figure["logits"], 2e-5)


def test_training_gradients_equal_official() -> None:
    figure = read_figure("vim/vim_tiny")
    layout = figure["checkpoint"] | {"pos_embed": figure["training"]["pos_embed_shape"]}
    model = lightspine.create_model("vim_tiny", img_size=64).double().train()
    model.load_state_dict(checkpoint_filter_fn(fill_checkpoint(layout), model))
    figure = figure["training"]
    loss = F.cross_entropy(model(figure_images(figure)), torch.tensor([0, 1]))
    loss.backward()
    assert_close("loss", loss, figure["loss"], 1e-9)
    names = checkpoint_filter_fn({key: key for key in layout}, small_vim(pos_embed=False))
    ours = {published: name for name, published in names.items()}
    parameters = dict(model.named_parameters())
    for key, expected in figure["gradients"].items():
        grad = parameters[ours[key]].grad
        assert grad is not None, key
        assert_close(key, grad.norm(), expected["l2"], 1e-6)
        assert_close(f"{key} (first 4)", grad.flatten()[:4], expected["first4"], 1e-6)
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert_close("all gradients", total, figure["total_gradient_l2"], 1e-6)


@pytest.mark.parametrize("directions", ["v2", "v1", "one-way", "layer-pairs"])
@pytest.mark.parametrize("class_token", ["middle", "head", "double", "none"])
def test_every_combination_trains_every_parameter(directions: str, class_token: str) -> None:
    model = small_vim(directions=directions, class_token=class_token).train()
    model(torch.randn(2, 3, 64, 64)).logsumexp(1).sum().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    "options",
    [
        {"class_token": "double"},
        {"class_token": "none", "global_pool": "max"},
        {"directions": "layer-pairs"},
        {"directions": "v1", "pos_embed": False, "dynamic_img_pad": True},
    ],
    ids=str,
)
def test_scripted_and_traced_models_give_the_same_numbers(options: dict[str, Any]) -> None:
    model = small_vim(**options)
    images = torch.randn(1, 3, 70, 50)
    expected = model(images)
    # A script calls the convolution as a layer, in another memory layout.
    torch.testing.assert_close(torch.jit.script(model)(images), expected, rtol=1e-5, atol=1e-6)
    last_node = get_graph_node_names(model)[1][-1]
    assert torch.equal(create_feature_extractor(model, {last_node: "logits"})(images)["logits"], expected)


def test_max_pooling_takes_the_largest_logit_of_all_tokens() -> None:
    model = small_vim(class_token="none", global_pool="max")
    tokens = model.forward_features(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.forward_head(tokens), model.head(tokens).max(dim=1).values)


def test_double_class_token_averages_both() -> None:
    model = small_vim(class_token="double")
    tokens = model.forward_features(torch.randn(2, 3, 64, 64))
    expected = model.head((tokens[:, 0] + tokens[:, -1]) / 2)
    torch.testing.assert_close(model.forward_head(tokens), expected)


@pytest.mark.parametrize(("height", "width"), [(97, 161), (225, 250), (33, 47)])
@pytest.mark.parametrize("stride", [16, 8])
def test_maps_have_one_pixel_per_whole_patch_at_odd_sizes(height: int, width: int, stride: int) -> None:
    model = small_vim(stride=stride)
    maps = model.forward_intermediates(torch.randn(1, 3, height, width), 2, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [
        ((height - 16) // stride + 1, (width - 16) // stride + 1)
    ] * 2


def test_pixels_beyond_the_last_patch_are_not_seen() -> None:
    model, images = small_vim(), torch.randn(1, 3, 79, 53)
    assert torch.equal(model(images), model(images[:, :, :64, :48]))


@pytest.mark.parametrize("stride", [16, 8])
def test_padded_images_equal_images_padded_by_hand(stride: int) -> None:
    model, padding = small_vim(stride=stride), small_vim(stride=stride, dynamic_img_pad=True)
    padding.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 79, 49)
    assert torch.equal(padding(images), model(F.pad(images, (0, (-49) % stride, 0, 1))))


def test_model_built_for_a_rectangle_equals_one_resized_to_it() -> None:
    square, wide = small_vim(), small_vim(img_size=(48, 96))
    assert wide.grid_size == (3, 6)
    wide.load_state_dict(checkpoint_filter_fn(square.state_dict(), wide))
    images = torch.randn(1, 3, 48, 96)
    torch.testing.assert_close(wide(images), square(images))


def test_exported_model_takes_other_sizes_than_its_example() -> None:
    model, dynamic = small_vim(), torch.export.Dim.DYNAMIC
    sizes = {"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    exported = torch.export.export(model, (torch.randn(2, 3, 96, 80),), dynamic_shapes=sizes).module()
    for shape in ((3, 3, 64, 64), (2, 3, 97, 161)):
        images = torch.randn(shape)
        torch.testing.assert_close(exported(images), model(images))


def test_residual_stream_stays_float32_under_autocast() -> None:
    model, images = small_vim(), torch.randn(1, 3, 64, 64)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, maps = model.forward_intermediates(images)
        logits = model.forward_head(tokens)
    assert {m.dtype for m in maps} == {torch.float32}
    assert_close("logits", logits, exact.tolist(), 3e-2)


def test_features_come_after_each_quarter_of_the_blocks() -> None:
    model = small_vim(depth=8, features_only=True)
    assert model.feature_info.module_name() == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 64, 96))] == [(1, 32, 4, 6)] * 4


def test_features_only_leaves_out_what_they_do_not_need() -> None:
    model = small_vim(features_only=True, out_indices=(0, 1))
    for m in model(torch.randn(1, 3, 64, 64)):
        m.sum().backward(retain_graph=True)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_weight_decay_groups_equal_published() -> None:
    model = small_vim(layer_scale=0.1)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {re.sub(r"^blocks\.\d+\.", "", name) for name, p in model.named_parameters() if id(p) in decayed}
    part = {"A_log", "conv1d.weight", "dt_proj.weight", "x_proj.weight"}
    mixer = {f"mixer.{way}.{name}" for way in ("ahead", "back") for name in part}
    assert names == mixer | {"mixer.in_proj.weight", "mixer.out_proj.weight", "stem.weight", "head.weight"}


def test_initialisation_is_published() -> None:
    model = lightspine.create_model("vim_tiny", depth=4)
    assert not model.stem.bias.any()
    # timm 0.4.12, with which the published models were trained.
    assert_close("stem", model.stem.weight.std(), 0.0410, 0.01)
    assert model.stem.weight.abs().max() > 3 * 0.0410  # not cut at two standard deviations
    assert not model.head.bias.any()
    for name in ("head.weight", "pos_embed", "cls_token"):
        assert_close(name, model.get_parameter(name).std(), 0.02, 0.15)
    # Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(fan in), here over sqrt(depth).
    bound = 384**-0.5 / 4**0.5
    assert_close("out_proj", model.blocks[3].mixer.out_proj.weight.abs().max(), bound, 1e-2)


def test_drop_path_grows_linearly_from_the_first_block() -> None:
    model = small_vim(depth=4, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_official_double_token_checkpoint_loads() -> None:
    model = small_vim(class_token="double")
    state = model.state_dict()
    official = {key: value for key, value in state.items() if key != "cls_token"}
    official |= {"cls_token_head": state["cls_token"][:, :1], "cls_token_tail": state["cls_token"][:, 1:]}
    assert torch.equal(checkpoint_filter_fn(official, model)["cls_token"], state["cls_token"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_maps_of_the_mixers_are_what_the_blocks_add(checkpointing: bool) -> None:
    stream = small_vim(class_token="none").double().eval()
    mixers = small_vim(class_token="none", feature_source="mixer").double().eval()
    mixers.load_state_dict(stream.state_dict())
    mixers.set_grad_checkpointing(checkpointing)
    images = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    tokens, expected = stream.forward_intermediates(images)
    last, found = mixers.forward_intermediates(images)
    for before, after, added in zip(expected, expected[1:], found[1:], strict=False):
        torch.testing.assert_close(added, after - before)
    assert torch.equal(last, tokens)


def test_mixers_of_layer_pairs_are_refused() -> None:
    with pytest.raises(UsageError, match="needs one mixer per block"):
        small_vim(directions="layer-pairs", feature_source="mixer")


@pytest.mark.parametrize(("resize", "first_row"), [("aligned", 0), ("official", 1)])
def test_model_without_a_class_token_leaves_out_its_row(resize: str, first_row: int) -> None:
    source = small_vim()
    with torch.no_grad():
        source.pos_embed.normal_()
    model = small_vim(class_token="none", pos_embed_resize=resize)
    report = lightspine.load_checkpoint(model, source.state_dict())
    rows = source.pos_embed.shape[1] - 1
    kept = list(range(rows + 1))
    # The token is in the middle; the official segmenters remove the first row.
    kept.remove(0 if resize == "official" else rows // 2)
    assert torch.equal(model.pos_embed[0], source.pos_embed[0, kept])
    assert kept[0] == first_row
    assert report.dropped == ["cls_token"]


def test_checkpoint_of_another_rectangle_is_refused() -> None:
    with pytest.raises(LightspineError, match="received 18 patches"):
        checkpoint_filter_fn(small_vim(img_size=(48, 96)).state_dict(), small_vim())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"class_token": "tail"},
            "class_token must be one of 'middle', 'head', 'double', 'none', got 'tail'",
        ),
        (
            {"directions": "both"},
            "directions must be one of 'v2', 'v1', 'one-way', 'layer-pairs', got 'both'",
        ),
        ({"norm": "batch"}, "norm must be one of 'rms', 'layer', got 'batch'"),
        (
            {"global_pool": "avg"},
            "global_pool for class_token 'middle' must be one of 'token', '', got 'avg'",
        ),
        ({"directions": "layer-pairs", "depth": 3}, "needs an even depth: received 3"),
        ({"directions": "layer-pairs", "divide_out": True}, "divide_out belongs to directions 'v2'"),
        ({"img_size": (8, 64)}, "img_size must be at least patch_size 16: received 8 x 64"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        small_vim(**options)


def test_pooling_without_its_class_token_is_refused_later_too() -> None:
    with pytest.raises(UsageError, match="must be one of 'avg', 'max', 'last', ''"):
        small_vim(class_token="none").reset_classifier(5, "token")
