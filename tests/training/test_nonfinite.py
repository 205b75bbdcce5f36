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


def _deferred(
    middle: nn.Module, images: Tensor, kind: str = "adamw", read_every: int = 5, **options: int
) -> tuple[nn.Module, NonFiniteGuard, torch.optim.Optimizer]:
    net, guard, _ = _prepare(middle, images, **options)
    guard.deferred = True
    guard.start(net, read_every=read_every)
    kinds = {
        "adamw": torch.optim.AdamW(net.parameters(), lr=0.1, fused=True),
        "sgd": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True),
    }
    return net, guard, kinds[kind]


def _deferred_step(
    net: nn.Module,
    guard: NonFiniteGuard,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    where: str = "step 3",
) -> None:
    loss = net(images).square().mean()
    optimizer.zero_grad()
    loss.backward()
    guard.check_loss(loss, net, images)
    guard.check_step(net, optimizer, where=where)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_skips_a_bad_step_that_is_not_read_yet(images: Tensor, kind: str) -> None:
    with_bad, alone = (_deferred(nn.Identity(), images, kind) for _ in range(2))
    for batch in (images, torch.full_like(images, float("nan")), images):
        _deferred_step(*with_bad, batch)
    for batch in (images, images):
        _deferred_step(*alone, batch)
    assert all(map(torch.equal, with_bad[0].state_dict().values(), alone[0].state_dict().values()))
    states = [[*optimizer.state_dict()["state"].values()] for _, _, optimizer in (with_bad, alone)]
    assert all(torch.equal(one[key], two[key]) for one, two in zip(*states, strict=True) for key in one)
    with_bad[1].read()
    assert with_bad[1].skipped == 1


def test_guard_that_reads_later_takes_the_steps_of_one_that_reads_at_once(images: Tensor) -> None:
    batches = [images, images + 1, torch.full_like(images, float("inf")), images + 2, images]
    later, at_once = _deferred(nn.Identity(), images), _deferred(nn.Identity(), images)
    at_once[1].deferred = False
    for prepared in (later, at_once):
        for batch in batches:
            _deferred_step(*prepared, batch)
    assert all(map(torch.equal, later[0].state_dict().values(), at_once[0].state_dict().values()))


def test_first_bad_step_is_named_when_the_results_are_read(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = _deferred(nn.Identity(), images, read_every=4)
    bad = torch.full_like(images, float("nan"))
    for step, batch in enumerate((images, bad, images)):
        _deferred_step(*prepared, batch, f"step {step}")
    assert not caplog.text
    _deferred_step(*prepared, bad, "step 3")
    assert "skipped 2 steps; first: non-finite loss at step 1; last: the input images are not" in caplog.text


def test_steps_after_a_bad_one_are_read_at_once(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    prepared = _deferred(nn.Identity(), images, read_every=2)
    bad = torch.full_like(images, float("nan"))
    for step, batch in enumerate((bad, images, bad)):
        _deferred_step(*prepared, batch, f"step {step}")
    assert "skipped a step: non-finite loss at step 2; the input images are not finite" in caplog.text
    assert prepared[1].skipped == 2


def test_guard_reads_many_steps_together_again_after_good_ones(images: Tensor) -> None:
    prepared = _deferred(nn.Identity(), images, read_every=2)
    bad = torch.full_like(images, float("nan"))
    for batch in (bad, images, images, images, bad):
        _deferred_step(*prepared, batch)
    assert prepared[1].skipped == 1
    prepared[1].read()
    assert prepared[1].skipped == 2


def test_run_stops_with_the_first_bad_step_when_the_results_are_read(images: Tensor) -> None:
    prepared = _deferred(nn.Identity(), images, read_every=5, max_bad_steps=3)
    bad = torch.full_like(images, float("nan"))
    for step, batch in enumerate((images, bad, bad, bad)):
        _deferred_step(*prepared, batch, f"step {step}")
    with pytest.raises(LightspineError, match=r"3 non-finite steps in a row.*first: .* step 1.*lower the"):
        prepared[1].read()


def test_counts_are_restored() -> None:
    guard, again = NonFiniteGuard(), NonFiniteGuard()
    guard.skipped, guard.in_a_row = 7, 2
    again.load_state_dict(guard.state_dict())
    assert (again.skipped, again.in_a_row) == (7, 2)


def test_max_bad_steps_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        NonFiniteGuard(max_bad_steps=0)
