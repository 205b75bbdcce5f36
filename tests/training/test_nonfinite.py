"""Non-finite guard: what a skipped step preserves, counters, traces and the end of a run."""

import logging

import pytest
import torch
from torch import Tensor, nn

from lightspine.errors import LightspineError, UsageError
from lightspine.training.nonfinite import NonFiniteGuard


class Divide(nn.Module):
    """Divides by the mean of the first image, which is non-finite for a mean of 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x[0].mean()


class Root(nn.Module):
    """Square root: finite at 0 with an infinite gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def _net(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), middle, nn.Flatten(), nn.LazyLinear(2))


def _step(
    net: nn.Module,
    guard: NonFiniteGuard,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    scale: float = 1.0,
) -> bool:
    loss = net(images).square().mean() * scale
    optimizer.zero_grad()
    loss.backward()
    guard.check_loss(loss, net, images)
    taken = guard.check_gradients(net, where="step 3")
    optimizer.step()
    return taken


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 2, 2)


def _prepare(
    middle: nn.Module, images: Tensor, **options: int
) -> tuple[nn.Module, NonFiniteGuard, torch.optim.Optimizer]:
    net = _net(middle)
    net.eval()(images)
    net.train()
    guard = NonFiniteGuard(**options)
    guard.start(net)
    return net, guard, torch.optim.AdamW(net.parameters(), lr=0.1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_bad_step_leaves_weights_buffers_and_optimizer_as_they_were(images: Tensor, scale: float) -> None:
    net, guard, optimizer = _prepare(nn.Identity(), images)
    assert _step(net, guard, optimizer, images)
    before = [value.clone() for value in net.state_dict().values()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    assert not _step(net, guard, optimizer, images, scale)
    assert all(map(torch.equal, before, net.state_dict().values()))
    assert all(map(torch.equal, moments, (state["exp_avg"] for state in optimizer.state.values())))
    assert [int(state["step"]) for state in optimizer.state.values()] == [1] * len(moments)


def test_batch_norm_survives_bad_images_in_the_first_step(images: Tensor) -> None:
    net, guard, optimizer = _prepare(nn.Identity(), images)
    assert not _step(net, guard, optimizer, torch.full_like(images, float("nan")))
    assert torch.equal(net[1].running_mean, torch.zeros(4))
    assert _step(net, guard, optimizer, images)


def test_good_step_after_a_bad_one_equals_the_same_step_alone(images: Tensor) -> None:
    with_bad, alone = (_prepare(nn.Identity(), images) for _ in range(2))
    _step(*with_bad, images, float("nan"))
    _step(*with_bad, images)
    _step(*alone, images)
    assert all(map(torch.equal, with_bad[0].state_dict().values(), alone[0].state_dict().values()))


def test_module_with_the_first_bad_output_is_named(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    net, guard, optimizer = _prepare(nn.Sequential(nn.Identity(), Divide()), images)
    with torch.no_grad():
        net[1].weight.zero_()  # its output is 0, and Divide divides by it
    with caplog.at_level(logging.WARNING):
        _step(net, guard, optimizer, images)
    assert "non-finite loss at step 3; the first module with a non-finite output is 2.1" in caplog.text


def test_bad_weight_is_named(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    net, guard, optimizer = _prepare(nn.Identity(), images)
    with torch.no_grad():
        net[0].bias.fill_(float("inf"))
    _step(net, guard, optimizer, images)
    assert "the weight 0.bias is not finite" in caplog.text


def test_bad_images_are_named(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    _step(*_prepare(nn.Identity(), images), torch.full_like(images, float("inf")))
    assert "the input images are not finite" in caplog.text


def test_loss_is_named_when_the_model_is_finite(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    _step(*_prepare(nn.Identity(), images), images, float("inf"))
    assert "model is finite, but the loss is not" in caplog.text


def test_parameter_behind_the_bad_slope_is_named(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    net, guard, optimizer = _prepare(Root(), images)
    with torch.no_grad():
        net[1].weight.zero_()
    _step(net, guard, optimizer, images)
    assert "non-finite gradient at step 3; the first parameter with" in caplog.text
    assert "gradient is 1.bias" in caplog.text


def test_good_loss_does_not_hide_a_bad_one_before_it_in_the_same_step(images: Tensor) -> None:
    net, guard, _ = _prepare(nn.Identity(), images)
    guard.check_loss(torch.tensor(float("nan")), net)
    guard.check_loss(torch.tensor(1.0), net)
    assert not guard.check_gradients(net)


def test_run_stops_after_bad_steps_in_a_row_with_advice(images: Tensor) -> None:
    prepared = _prepare(nn.Identity(), images, max_bad_steps=2)
    for scale in (float("nan"), 1.0, float("nan")):
        _step(*prepared, images, scale)
    with pytest.raises(LightspineError, match=r"2 non-finite steps in a row.*step 3.*lower the learning"):
        _step(*prepared, images, float("nan"))
    assert prepared[1].skipped == 3


class Scaler:
    """A gradient scaler with a given scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.parametrize(("scale", "counted"), [(65536.0, 0), (0.5, 1)])
def test_infinite_gradient_is_the_scalers_business_while_its_scale_is_high(
    images: Tensor, scale: float, counted: int
) -> None:
    net, guard, _ = _prepare(nn.Identity(), images)
    net(images).sum().backward()
    net[0].weight.grad.fill_(float("inf"))
    guard.check_loss(torch.tensor(1.0), net, images)
    assert not guard.check_gradients(net, scaler=Scaler(scale))
    assert guard.skipped == counted


def test_counts_are_restored() -> None:
    guard, again = NonFiniteGuard(), NonFiniteGuard()
    guard.skipped, guard.in_a_row = 7, 2
    again.load_state_dict(guard.state_dict())
    assert (again.skipped, again.in_a_row) == (7, 2)


def test_max_bad_steps_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        NonFiniteGuard(max_bad_steps=0)
