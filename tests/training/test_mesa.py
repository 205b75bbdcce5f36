"""MESA: when it counts, and what it adds."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.training.mesa import Mesa


class Fixed(nn.Module):
    """Gives the same logits for every image, others in training."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1) * (100.0 if self.training else 1.0)


@pytest.mark.parametrize(("epoch", "active"), [(0, False), (74, False), (75, True), (299, True), (309, True)])
def test_published_mesa_begins_with_epoch_75_of_300(epoch: int, active: bool) -> None:
    assert Mesa().is_active(epoch, 300) is active


def test_start_of_a_part_of_an_epoch_is_rounded_down() -> None:
    assert Mesa(start=0.25).is_active(0, 3)
    assert not Mesa(start=0.25).is_active(0, 4)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_loss_is_the_soft_cross_entropy_with_the_average_in_evaluation(weight: float) -> None:
    average = Fixed([math.log(3.0), 0.0]).train()  # probabilities 3/4 and 1/4
    student = torch.tensor([[0.0, math.log(4.0)], [0.0, 0.0]])  # 1/5, 4/5 and 1/2, 1/2
    expected = (-0.75 * math.log(0.2) - 0.25 * math.log(0.8) + math.log(2.0)) / 2
    loss = Mesa(weight=weight).loss(student, average, torch.zeros(2, 3, 4, 4))
    assert loss.item() == pytest.approx(weight * expected, rel=1e-6)


def test_gradient_reaches_the_student_only() -> None:
    average, student = Fixed([1.0, 0.0]), torch.zeros(2, 2, requires_grad=True)
    Mesa().loss(student, average, torch.zeros(2, 3, 4, 4)).backward()
    assert student.grad is not None
    assert average.logits.grad is None


def test_half_precision_keeps_small_probabilities() -> None:
    average = Fixed([12.0, 0.0]).half()
    student = torch.tensor([[0.0, 12.0]], dtype=torch.float16)
    loss = Mesa().loss(student, average, torch.zeros(1, 3, 4, 4))
    expected = nn.functional.cross_entropy(student.double(), torch.tensor([[12.0, 0.0]]).double().softmax(1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_student_with_two_heads_is_refused() -> None:
    with pytest.raises(UsageError, match="one head"):
        Mesa().loss((torch.zeros(1, 2), torch.zeros(1, 2)), Fixed([0.0, 0.0]), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"), [({"start": 1.5}, "from 0 to 1, got 1.5"), ({"weight": 0.0}, "above 0, got 0.0")]
)
def test_wrong_value_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mesa(**options)
