"""Derivatives of every family in every mode of PyTorch, against central differences in float64."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

import lightspine
from lightspine.errors import UsageError
from support.tiny_models import SMALLEST, tiny_images, tiny_model

# PyTorch's forward mode itself scripts a few formulas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    # Slow, not wrong: the pooling of VMamba's head, which is timm's.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

STEP = 1e-5


@pytest.fixture(scope="module", params=SMALLEST)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Without kinks, at which a difference would be wrong; shared, so tests must not change it."""
    return smooth(tiny_model(request.param))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return tiny_images()


@pytest.fixture(scope="module")
def direction() -> Tensor:
    return tiny_images(3)[1:]


def smooth(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.SiLU())
    return model.eval()


def total(model: nn.Module, images: Tensor) -> Tensor:
    """Return a number that depends on the logits in a curved way."""
    return F.softplus(model(images)).square().sum()


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    return torch.autograd.grad(total(model, images), images)[0]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Compare with a central difference, which has six exact digits or more."""
    assert expected.norm() > 0
    assert (actual - expected).norm() / expected.norm() < 1e-5


@torch.no_grad()
def central_difference(function, at: Tensor, direction: Tensor) -> Tensor:
    return (function(at + STEP * direction) - function(at - STEP * direction)) / (2 * STEP)


def test_forward_mode_gives_the_directional_derivative(model, images, direction):
    assert_near(jvp(model, (images,), (direction,))[1], central_difference(model, images, direction))


def test_dual_numbers_give_the_directional_derivative_without_gradients(model, images, direction):
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(images, direction))).tangent
    assert_near(tangent, central_difference(model, images, direction))


def test_forward_mode_in_the_weights(model, images):
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def output(step: Tensor) -> Tensor:
        moved = {name: weight + step * direction[name] for name, weight in weights.items()}
        return functional_call(model, moved, (images,))

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert_near(jvp(output, (zero,), (one,))[1], central_difference(output, zero, one))


def test_gradient_can_be_differentiated_again(model, images, direction):
    at = images.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(model, at), at, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), at)
    assert_near(second, _difference_of_gradients(model, images, direction))


def test_gradient_penalty_reaches_every_weight(model, images):
    """Compares the gradient of the norm of the input gradient for a random direction of all weights."""
    weights = {name: weight.detach().requires_grad_() for name, weight in model.named_parameters()}
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def penalty(values: dict[str, Tensor], create_graph: bool) -> Tensor:
        at = images.clone().requires_grad_()
        loss = F.softplus(functional_call(model, values, (at,))).square().sum()
        return torch.autograd.grad(loss, at, create_graph=create_graph)[0].square().sum()

    penalty(weights, True).backward()
    along = sum((w.grad * direction[n]).sum() for n, w in weights.items() if w.grad is not None)
    moved = (
        {name: (weight + sign * STEP * direction[name]).detach() for name, weight in weights.items()}
        for sign in (1, -1)
    )
    plus, minus = (penalty(values, False) for values in moved)
    assert_near(along, (plus - minus) / (2 * STEP))


def test_forward_over_reverse_mode(model, images, direction):
    (_, second) = jvp(grad(functools.partial(total, model)), (images,), (direction,))
    assert_near(second, _difference_of_gradients(model, images, direction))


def test_hessian(model, images):
    directions = tiny_images(4)[2:]

    def along(steps: Tensor) -> Tensor:
        return total(model, images[:1] + torch.tensordot(steps, directions, dims=1)[None])

    zero = torch.zeros(2, dtype=torch.float64)
    expected = torch.stack(
        [central_difference(torch.enable_grad()(grad(along)), zero, row) for row in torch.eye(2).double()]
    )
    assert_near(hessian(along)(zero), expected)


def test_vmap_over_images_gives_the_batch(model, images):
    one_by_one = vmap(lambda image: model(image[None])[0])(images)
    torch.testing.assert_close(one_by_one, model(images))


def test_vmap_over_weights_gives_the_ensemble(model, images):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    weights, buffers = stack_module_state([model, other])
    ensemble = vmap(lambda w, b: functional_call(model, (w, b), (images,)))(weights, buffers)
    torch.testing.assert_close(ensemble, torch.stack([model(images), other(images)]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_of_one_call_receive_the_gradients_of_the_call(model, images, checkpointing):
    """Recomputation in the backward pass must not use the weights that the module holds by then."""
    weights = {name: (1.3 * weight).detach().requires_grad_() for name, weight in model.named_parameters()}
    model.set_grad_checkpointing(checkpointing)
    F.softplus(functional_call(model, weights, (images,))).sum().backward()
    model.set_grad_checkpointing(False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    F.softplus(other(images)).sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(weights[name].grad, parameter.grad, msg=name)


def test_gradients_per_sample(model, images):
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    labels = torch.tensor([1, 3])

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (image[None],)), label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    for index in range(len(images)):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        loss(leaves, images[index], labels[index]).backward()
        for name, leaf in leaves.items():
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(per_sample[name][index], expected, rtol=1e-6, atol=1e-10, msg=name)


def test_optimized_model_has_the_forward_derivative_of_the_model(model, images, direction):
    optimized = lightspine.optimize(model.float())
    actual = jvp(optimized, (images.float(),), (direction.float(),))[1]
    model.double()
    torch.testing.assert_close(actual.double(), jvp(model, (images,), (direction,))[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["vim", "vmamba"])
def test_forward_mode_through_a_traced_scan_is_refused(family):
    traced = torch.fx.symbolic_trace(tiny_model(family))
    images = tiny_images()
    with pytest.raises(UsageError, match="no forward-mode derivative: differentiate the model itself"):
        jvp(traced, (images,), (images,))


def _difference_of_gradients(model: nn.Module, images: Tensor, direction: Tensor) -> Tensor:
    differentiate = torch.enable_grad()(functools.partial(gradient, model))
    return central_difference(differentiate, images, direction)
