"""General inference optimization: BatchNorm folding, packed weights and removal of inactive layers.

The pass knows which layers follow each other from the order of a plain `nn.Sequential` and, for any other
module, from a `torch.fx` trace of its `forward` in which its submodules are opaque calls. A module whose
`forward` cannot be traced keeps its own layers as they are.
"""

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d, DropPath
from timm.utils import reparameterize_model
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightspine.errors import UsageError
from lightspine.optimize.cuda_graph import CudaGraphModel, check_capture
from lightspine.optimize.folding import (
    BATCH_NORMS,
    FOLDABLE_LAYERS,
    batch_norm_affine,
    scale_input,
    scale_output,
)
from lightspine.optimize.packed import PackedConv2d, PackedLinear, PackedPointwise, can_fuse, is_pointwise

Module = TypeVar("Module", bound=nn.Module)
InferenceForm = Callable[[Any], Any]
InferenceFormType = TypeVar("InferenceFormType", bound=InferenceForm)

_INACTIVE_IN_EVALUATION = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    DropPath,
)
_INFERENCE_FORMS: dict[type[nn.Module], InferenceForm] = {}
# Packages whose layers the registered forms know.
_KNOWN_PACKAGES = ("torch", "torchvision", "timm", "lightspine")


def register_inference_form(kind: type[nn.Module]) -> Callable[[InferenceFormType], InferenceFormType]:
    """Register a faster form of a module type for `optimize`.

    Decorates a function or class that takes a module of exactly this type and returns its replacement. The
    module is a copy, which may be changed; its submodules have their inference forms already, with every
    BatchNorm folded that can be.

    Args:
        kind: module type; subclasses are not affected.

    Raises:
        ValueError: the type has a registered form.
    """

    def decorate(form: InferenceFormType) -> InferenceFormType:
        if kind in _INFERENCE_FORMS:
            raise ValueError(f"{kind.__name__} already has an inference form")
        _INFERENCE_FORMS[kind] = form
        return form

    return decorate


@overload
def optimize(model: Module, example: None = None, *, cuda_graph: Literal[False] = False) -> Module: ...


@overload
def optimize(model: nn.Module, example: Tensor, *, cuda_graph: Literal[True]) -> CudaGraphModel: ...


@torch.no_grad()
def optimize(model: nn.Module, example: Tensor | None = None, *, cuda_graph: bool = False) -> nn.Module:
    """Return a copy of a model for inference that computes the same output within rounding error.

    The copy is made for the device of the model: move the model before. For any model:

    - every BatchNorm directly behind a convolution or linear layer, or before a linear layer, is folded into
      its weights; one elsewhere stays;
    - the weights of linear layers and convolutions are packed for oneDNN, fused with the activation that
      follows, where the model is on a CPU;
    - layers that do nothing in evaluation mode, such as dropout, are replaced by `nn.Identity`;
    - timm's reparameterizable blocks (RepVGG, MobileOne, FastViT and others) are fused.

    For the families of this library in addition:

    - values that do not depend on the image are computed once: `-exp(A_log)`, gates, layer scales, the scale
      of the attention, mirrored kernels, the affine part of a norm before a pointwise layer;
    - residual depthwise branches `x + BN(conv(x))` become one convolution, and consecutive linear layers one:
      the two classifiers of a distilled model, the classifiers of EfficientViM's stages.

    On a CUDA device the weights are not packed, and the forms are others:

    - a linear layer with a bias and a ReLU is one launch. In bfloat16 so is one with a GELU, which is then
      computed by the hyperbolic tangent: its mean square error is less than 2 % of that of rounding to
      bfloat16;
    - SHViT computes in `torch.channels_last` format, as the other families with maps do everywhere, and their
      1x1 convolutions are matrix products;
    - attention is PyTorch's fused kernel, except for SHViT's maps of at most 64 positions;
    - Vim's parameters of both directions are joined once instead of at every call;
    - VMamba's and Vim's conversions to the dtype of the weights, and VMamba's residual additions before a
      norm, are part of the norm's kernel.

    `torch.compile` compiles the copy in one graph; it sees plain layers, which it fuses by itself.

    A block with hooks, adapters (LoRA), parametrizations or quantized weights inside keeps its own form.
    Quantize before: the packed layers are no `nn.Linear`, so `torchao.quantization.quantize_` skips them.

    The copy keeps timm's `forward`, `forward_features`, `forward_head`, `forward_intermediates` and the
    attributes of the model. It is for inference only: its parameters require no gradient, its state dict
    differs from the model's, and its classifier cannot be reset.

    Args:
        model: any module in evaluation mode, such as a model of lightspine or timm, also with
            `features_only=True`, a detector or a segmenter; it is not changed.
        example: images of the shape, dtype and device of all calls, for `cuda_graph`.
        cuda_graph: capture the forward pass for the example into a CUDA graph, and return a
            `lightspine.optimize.CudaGraphModel`. Small batches spend most of their time launching kernels,
            which a graph launches all at once. The result takes images of that shape, dtype and device only
            and refuses others; its attribute `model` is the optimized copy, which takes any.

    Raises:
        UsageError: the model or a part of it is in training mode; an example without `cuda_graph`; a CUDA
            graph without an example, or of a model or an example on another device.

    Examples:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1").eval()
        >>> fast = lightspine.optimize(model)
        >>> fast(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    if cuda_graph:
        check_capture(model, example)
    elif example is not None:
        raise UsageError("an example is used with cuda_graph=True only, received one without it")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise UsageError(f"expected a model in evaluation mode (model.eval()), but {training[0]} is training")
    pass_ = _Optimization(reparameterize_model(copy.deepcopy(model), inplace=True))
    optimized = pass_.replace(pass_.model)
    pass_.pack_layers(optimized)
    optimized = optimized.eval().requires_grad_(False)
    return optimized if example is None else CudaGraphModel(optimized, example)


class _Fusion(NamedTuple):
    """A layer of `owner` to be packed together with the activation that follows it, if any."""

    owner: nn.Module
    layer_name: str
    layer: nn.Module
    activation_name: str | None
    activation: nn.Module | None


class _Optimization:
    """State of one `optimize` call on the copy of a model."""

    def __init__(self, model: nn.Module):
        self.model = model
        # A module that the model uses in several places cannot be changed for one of them.
        self.occurrences = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.replaced: dict[nn.Module, nn.Module] = {}
        self.fusions: list[_Fusion] = []

    def replace(self, module: Any) -> Any:
        """Return the inference form of a module, after those of its submodules."""
        if module in self.replaced:
            return self.replaced[module]
        result = module
        # Looked at before the submodules are replaced.
        register = None if _is_customized(module) else _INFERENCE_FORMS.get(type(module))
        for name, child in list(module._modules.items()):
            if child is not None and (form := self.replace(child)) is not child:
                setattr(module, name, form)
        if register is not None:
            result = register(module)
        elif type(module) in _INACTIVE_IN_EVALUATION and not _is_changed(module):
            result = nn.Identity()
        for names in _call_sequences(result):
            for start in range(len(names)):
                self.fold_and_fuse(result, names[start:])
        self.replaced[module] = result
        return result

    def fold_and_fuse(self, owner: nn.Module, names: list[str]) -> None:
        """Fold the BatchNorms next to the first of consecutive layers, and list that layer for packing."""
        layers = []
        for name in names:
            layer = owner.get_submodule(name)
            if self.occurrences[layer] > 1 or _is_changed(layer):
                break
            layers.append(layer)
        if not layers:
            return
        first = layers[0]
        if (affine := batch_norm_affine(first)) is not None:
            following = next((m for m in layers[1:] if type(m) not in _INACTIVE_IN_EVALUATION), None)
            if type(following) is nn.Linear and following.in_features == first.num_features:
                scale_input(following, *affine)
                owner.set_submodule(names[0], _after_batch_norm(first))
            return
        activation_name = activation = None
        for name, layer in zip(names[1:], layers[1:], strict=False):
            affine = batch_norm_affine(layer)
            if affine is not None and _normalizes_output(layer, first):
                scale_output(first, *affine)  # type: ignore[arg-type]
                layer = _after_batch_norm(layer)
                owner.set_submodule(name, layer)
            if type(layer) not in _INACTIVE_IN_EVALUATION:
                if can_fuse(layer):
                    activation_name, activation = name, layer
                break
        if _can_pack(first):
            self.fusions.append(_Fusion(owner, names[0], first, activation_name, activation))

    def pack_layers(self, optimized: nn.Module) -> None:
        """Pack the listed layers that registered forms have not replaced.

        Packing comes last, because registered forms expect plain layers in the blocks that they replace.
        """
        present = set(optimized.modules())
        # Outermost module first: it may know of an activation behind the last layer of an inner one.
        for owner, name, layer, activation_name, activation in reversed(self.fusions):
            if owner not in present or _find_submodule(owner, name) is not layer:
                continue
            if activation_name and _find_submodule(owner, activation_name) is not activation:
                continue
            owner.set_submodule(name, _pack(layer, activation))
            if activation_name:
                owner.set_submodule(activation_name, nn.Identity())


def _find_submodule(owner: nn.Module, name: str) -> nn.Module | None:
    return dict(owner.named_modules()).get(name)


def _is_customized(module: nn.Module) -> bool:
    """Return whether a user has put hooks, adapters or other weights into a module or what it contains.

    The registered forms read weights instead of calling layers, so that such a part would be lost.
    """
    for part in module.modules():
        package = type(part).__module__.partition(".")[0]
        if part is not module and package not in _KNOWN_PACKAGES and type(part) not in _INFERENCE_FORMS:
            return True
        if _is_changed(part):
            return True
    return False


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module itself has hooks, another `forward`, parametrizations or quantized weights."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    if hasattr(module, "parametrizations"):
        return True
    return any(is_traceable_wrapper_subclass(tensor) for tensor in module._parameters.values())


def _normalizes_output(norm: Any, layer: Any) -> bool:
    """Whether a BatchNorm has one channel for each output channel of a foldable layer."""
    if type(layer) is nn.Linear:
        return type(norm) is nn.BatchNorm1d and norm.num_features == layer.out_features
    return type(layer) in FOLDABLE_LAYERS and norm.num_features == layer.out_channels


def _after_batch_norm(norm: nn.Module) -> nn.Module:
    """Return the dropout and activation of timm's BatchNormAct2d; `nn.Identity` for a plain BatchNorm."""
    parts = [norm.drop, norm.act] if isinstance(norm, BatchNormAct2d) else []
    parts = [part for part in parts if type(part) not in _INACTIVE_IN_EVALUATION]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()


def _can_pack(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _pack(layer: Any, activation: nn.Module | None) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer, activation)
    kind = PackedPointwise if is_pointwise(layer) else PackedConv2d
    return kind(layer, activation, keep_layout=True)


def _is_plain_sequential(module: nn.Module | None) -> bool:
    # A shared module is listed once by named_children, though it is called several times.
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and len(list(module.named_children())) == len(module)
        and not _is_changed(module)
    )


def _call_sequences(owner: nn.Module) -> list[list[str]]:
    """Return the names of submodules that a module calls one directly after the other.

    Each takes the output of the one before as its only input, and nothing else uses that output. A plain
    `nn.Sequential` is given as its layers.
    """
    if _is_plain_sequential(owner):
        sequences = [[name for name, _ in owner.named_children()]]
    elif any(type(module) in (*FOLDABLE_LAYERS, *BATCH_NORMS) for module in owner.modules()):
        sequences = _traced_sequences(owner)
    else:
        return []
    return [[part for name in names for part in _expand(owner, name)] for names in sequences]


def _expand(owner: nn.Module, name: str) -> list[str]:
    module = owner.get_submodule(name)
    if not _is_plain_sequential(module):
        return [name]
    return [part for child, _ in module.named_children() for part in _expand(owner, f"{name}.{child}")]


def _traced_sequences(owner: nn.Module) -> list[list[str]]:
    graphs = [_successors(graph) for graph in _trace_variants(owner)]
    if not graphs:
        return []
    successors = {
        name: following if all(graph[name] == following for graph in graphs) else None
        for name, following in graphs[0].items()
        if all(name in graph for graph in graphs)
    }
    sequences = []
    for first in successors.keys() - set(successors.values()):
        names: list[str] = []
        name: str | None = first
        while name in successors:
            names.append(name)
            name = successors[name]
        sequences.append(names)
    return sequences


def _successors(graph: torch.fx.Graph) -> dict[str, str | None]:
    """Map each submodule that is called once to the only consumer of its output, if that is a submodule."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A layer must keep its parameters if the module also reads them directly.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    single = {
        node: str(node.target)
        for node in graph.nodes
        if node.op == "call_module"
        and calls[node.target] == 1
        and len(node.args) == 1
        and not node.kwargs
        and node.target not in read
    }
    successors: dict[str, str | None] = {}
    for node, name in single.items():
        (user,) = node.users if len(node.users) == 1 else (None,)
        successors[name] = single.get(user) if user is not None else None
    return successors


class _SubmodulesAsCalls(torch.fx.Tracer):
    """Traces one module's `forward` and records each submodule as a single call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True


def _trace_variants(module: nn.Module) -> list[torch.fx.Graph]:
    """Trace a module's `forward`: with its defaults, with optional inputs given, and with its flags inverted.

    Returns:
        The graphs; none when a trace fails, as it does where the flow of control depends on values.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    variants = [defaults]
    if None in defaults.values():
        variants.append({name: value for name, value in defaults.items() if value is not None})
    if any(isinstance(value, bool) for value in defaults.values()):
        variants.append({n: not value if isinstance(value, bool) else value for n, value in defaults.items()})
    graphs = []
    for arguments in variants:
        attributes = dict(module.__dict__)
        try:
            # torch.fx warns of arguments that it cannot check against their default at run time.
            with warnings.catch_warnings(action="ignore"):
                graphs.append(_SubmodulesAsCalls().trace(module, concrete_args=arguments or None))
        # A forward may raise any exception for proxies instead of tensors; its layers then stay as they are.
        except Exception:
            return []
        finally:
            # A forward may store what it computes, here proxies.
            module.__dict__.clear()
            module.__dict__.update(attributes)
    return graphs
