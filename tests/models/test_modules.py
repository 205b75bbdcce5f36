"""Every layer of every family runs as a module, so that whatever wraps or replaces a layer is what runs."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lightspine
from support.tiny_models import SMALLEST, tiny_images, tiny_model

# Options whose layers the smallest models do not have.
VARIANTS = {family: {} for family in SMALLEST} | {
    "vim-v1": {"directions": "v1"},
    "vim-one-way": {"directions": "one-way"},
    "vim-layer-pairs": {"directions": "layer-pairs"},
    "vmamba-gate": {"gate": "silu", "out_norm": "layer_dwconv", "out_act": True},
    "vmamba-dwconv": {"out_norm": "dwconv"},
    "efficientvim-nc-ssd": {"mixer": "nc-ssd", "distilled": True},
}
LAYERS = (nn.Linear, nn.Conv2d, nn.Conv1d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, nn.BatchNorm1d, nn.GroupNorm)


def build(variant: str, **options) -> nn.Module:
    return tiny_model(variant.partition("-")[0], **VARIANTS[variant], **options)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Shared, so tests must not change it."""
    return build(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return tiny_images()


class Adapter(nn.Module):
    """Low-rank adapter as of LoRA: adds the product of two more layers of the same kind."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        rank = 2
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        else:
            kind = nn.Conv1d if isinstance(base, nn.Conv1d) else nn.Conv2d
            groups = base.groups
            self.down = kind(
                base.in_channels,
                rank * groups,
                base.kernel_size,
                base.stride,
                base.padding,
                groups=groups,
                bias=False,
            )
            self.up = kind(rank * groups, base.out_channels, 1, groups=groups, bias=False)
        self.double()
        for parameter in (*self.down.parameters(), *self.up.parameters()):
            nn.init.normal_(parameter, std=0.05)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.base(*args, **kwargs) + self.up(self.down(*args))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return the layer with the adapter added to its weight."""
        down, up = self.down.weight, self.up.weight
        if isinstance(self.base, nn.Linear):
            self.base.weight += up @ down
        else:
            groups = self.base.groups
            grouped_down = down.unflatten(0, (groups, -1))
            grouped_up = up.unflatten(0, (groups, -1)).flatten(2)
            self.base.weight += torch.einsum("gor,gr...->go...", grouped_up, grouped_down).flatten(0, 1)
        return self.base


class AdapterWithWeight(Adapter):
    """Adapter that shows the attributes of its layer, as those of peft do."""

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def names_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hook_on_any_submodule_fires_and_changes_nothing(variant, training, images):
    model = build(variant, drop_path_rate=0.1).train(training)
    torch.manual_seed(1)
    expected = copy.deepcopy(model)(images)
    fired: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    torch.manual_seed(1)
    output = model(images)
    for a, b in zip(_tuple(output), _tuple(expected), strict=True):
        torch.testing.assert_close(a, b)
    # Containers have no forward, and nn.Identity stands for a layer that the model does not have.
    containers = (nn.ModuleList, nn.Identity)
    never = {name for name, module in model.named_modules() if not isinstance(module, containers)} - fired
    if not training:
        never -= {name for name in never if name.endswith("drop_path")}
    assert never == set()


def test_backward_hooks_fire_on_every_linear_layer_and_block(model, images):
    model = copy.deepcopy(model)
    fired: set[str] = set()
    # Not on convolutions and norms: PyTorch has no such hook where an in-place ReLU overwrites the output.
    names = [name for name in dict(model.named_modules()) if name.split(".")[-2:-1] == ["blocks"]]
    names += names_of(model, (nn.Linear,))
    for name in names:
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: fired.add(name))
    model(images.clone().requires_grad_()).sum().backward()
    assert fired == set(names)


@pytest.mark.parametrize("kind", [Adapter, AdapterWithWeight])
def test_adapters_on_every_layer_train_and_merge(model, images, kind):
    adapted = copy.deepcopy(model)
    # An activation must not overwrite what the output of an adapter's layer is needed for.
    for name in names_of(adapted, LAYERS):
        adapted.set_submodule(name, kind(adapted.get_submodule(name)))
    output = adapted(images)
    assert not torch.allclose(output, model(images), rtol=1e-3)
    (output * torch.randn_like(output)).sum().backward()
    adapters = [module for module in adapted.modules() if isinstance(module, Adapter)]
    without = [a for a in adapters if a.up.weight.grad is None or not a.up.weight.grad.abs().max()]
    assert without == []
    for name in names_of(adapted, (Adapter,)):
        adapted.set_submodule(name, adapted.get_submodule(name).merge())
    torch.testing.assert_close(adapted(images), output, rtol=1e-9, atol=1e-9)


class Wrapper(nn.Module):
    """Wrapper without any attribute of the layer that it calls."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_any_layer_can_be_wrapped(model, images):
    wrapped = copy.deepcopy(model)
    for name in names_of(wrapped, (*LAYERS, *NORMS)):
        wrapped.set_submodule(name, Wrapper(wrapped.get_submodule(name)))
    torch.testing.assert_close(wrapped(images), model(images))
    assert all(module.calls for module in wrapped.modules() if isinstance(module, Wrapper))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized_weights_are_the_ones_used(model, images):
    parametrized, scaled = copy.deepcopy(model), copy.deepcopy(model)
    for name in names_of(parametrized, LAYERS):
        parametrize.register_parametrization(parametrized.get_submodule(name), "weight", Doubled())
        with torch.no_grad():
            scaled.get_submodule(name).weight *= 2
    torch.testing.assert_close(parametrized(images), scaled(images))


# PyTorch deprecates this quantizer, which is still in use.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantized_linear_layers_run(model, images):
    single = copy.deepcopy(model).float()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(single), {nn.Linear})
    replaced = names_of(quantized, (torch.ao.nn.quantized.dynamic.Linear,))
    assert len(replaced) == len([m for m in single.modules() if type(m) is nn.Linear])
    with torch.no_grad():
        expected, actual = single(images.float()), quantized(images.float())
    assert 0 < (actual - expected).abs().max() < 0.2 * expected.abs().max()


def quantizable(module: nn.Module, _name: str) -> bool:
    # torchao fails for weights of shape (n, 1), which only these tiny models have.
    return isinstance(module, nn.Linear) and module.in_features > 1


@pytest.mark.parametrize("family", SMALLEST)
def test_weights_quantized_by_torchao_are_kept_by_optimize(family, images):
    quantization = pytest.importorskip("torchao.quantization")
    single, images = build(family).float(), images.float()
    quantized = copy.deepcopy(single)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig(), filter_fn=quantizable)
    with torch.no_grad():
        expected, actual = single(images), quantized(images)
        assert 0 < (actual - expected).abs().max() < 0.2 * expected.abs().max()
        torch.testing.assert_close(lightspine.optimize(quantized)(images), actual, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# A block returns a permuted view, which nothing modifies.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.usefixtures("one_process")
def test_blocks_sharded_one_by_one_give_the_same_gradients(model, images):
    mesh = init_device_mesh("cpu", (1,))
    plain, sharded = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    blocks = [m for name, m in sharded.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
    assert blocks
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for each in (plain, sharded):
        sum(logits.square().sum() for logits in _tuple(each(images))).backward()
    for (name, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad.full_tensor(), a.grad, msg=name)


def _tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
