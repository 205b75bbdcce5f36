"""Distillation and MESA losses in closed form, and the input of the teacher."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine.models.saving import save_checkpoint
from lightspine.training.distillation import Distiller, Mesa

# A small ResNet and a small ViT of timm; both take images normalised by 0.5 throughout.
RESNET, VIT = "test_resnet", "test_vit"
IMAGES = torch.zeros(2, 3, 32, 32)


def write_teacher(folder: Path, name: str = RESNET, num_classes: int = 2) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    return folder / f"{name}.pth", model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))[0]


class Says(nn.Module):
    """Teacher with fixed logits for each image."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


def taught_by(weights: Path, logits: list[list[float]], **options: Any) -> Distiller:
    distiller = Distiller(RESNET, 2, checkpoint=weights, **options)
    distiller.teacher = Says(logits)
    return distiller


def test_hard_loss_is_the_cross_entropy_with_the_decision(weights: Path) -> None:
    distiller = taught_by(weights, [[0.3, 0.1], [-1.0, 2.0]])
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    student = torch.tensor([[math.log(4.0), 0.0], [0.0, math.log(9.0)]])  # 4/5 of class 0, 9/10 of class 1
    loss = distiller.loss((logits, student), torch.tensor([1, 0]), IMAGES, F.cross_entropy)
    base = (-math.log(0.75) - math.log(0.5)) / 2
    taught = (-math.log(0.8) - math.log(0.9)) / 2
    assert loss.item() == pytest.approx(0.5 * base + 0.5 * taught, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_loss_of_two_heads_is_divided_by_images_and_classes(weights: Path, temperature: float) -> None:
    scale = temperature * math.log(3.0)
    distiller = taught_by(
        weights, [[scale, 0.0], [0.0, 0.0]], kind="soft", alpha=0.25, temperature=temperature
    )
    student = torch.tensor([[0.0, scale], [0.0, 0.0]])
    loss = distiller.loss((student, student), torch.tensor([0, 0]), IMAGES, lambda _x, _y: torch.tensor(8.0))
    # Teacher 3/4, 1/4 against student 1/4, 3/4: a divergence of log(3) / 2; the second image agrees.
    taught = temperature**2 * 0.5 * math.log(3.0) / 4
    assert loss.item() == pytest.approx(0.75 * 8.0 + 0.25 * taught, rel=1e-6)


def test_soft_loss_of_one_head_is_divided_by_images(weights: Path) -> None:
    scale = 4.0 * math.log(3.0)
    distiller = taught_by(
        weights, [[scale, 0.0], [0.0, 0.0]], kind="soft", alpha=0.9, temperature=4.0, heads="one"
    )
    logits = torch.tensor([[0.0, scale], [0.0, 0.0]])
    shares = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    loss = distiller.loss(logits, shares, IMAGES, F.cross_entropy)
    base = (math.log1p(3.0**4) - 0.5 * scale + math.log(2.0)) / 2
    taught = 4.0**2 * 0.5 * math.log(3.0) / 2
    assert loss.item() == pytest.approx(0.1 * base + 0.9 * taught, rel=1e-5)


def test_gradient_reaches_both_heads_and_never_the_teacher(weights: Path) -> None:
    distiller = Distiller(RESNET, 2, checkpoint=weights)
    heads = [torch.zeros(2, 2, requires_grad=True) for _ in range(2)]
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    distiller.loss((heads[0], heads[1]), torch.tensor([0, 1]), images, F.cross_entropy).backward()
    assert all(head.grad.abs().sum() > 0 for head in heads)
    assert images.grad is None
    assert not any(parameter.requires_grad for parameter in distiller.teacher.parameters())


def test_teacher_is_in_evaluation_and_its_norms_stay(weights: Path) -> None:
    distiller = Distiller(RESNET, 2, checkpoint=weights)
    before = {key: value.clone() for key, value in distiller.teacher.state_dict().items()}
    distiller.teacher_logits(torch.randn(4, 3, 32, 32))
    assert not any(module.training for module in distiller.teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in distiller.teacher.state_dict().items())


def test_teacher_is_no_part_of_the_module_that_holds_the_distiller(weights: Path) -> None:
    task = nn.Linear(2, 2)
    task.distiller = Distiller(RESNET, 2, checkpoint=weights)
    assert task.state_dict().keys() == {"weight", "bias"}
    assert len(list(task.parameters())) == 2


def test_making_a_teacher_leaves_the_global_generator_alone(weights: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    Distiller(RESNET, 2, checkpoint=weights)
    assert torch.equal(torch.rand(1), expected)


def test_copy_of_a_task_shares_the_teacher(weights: Path) -> None:
    task = nn.Linear(2, 2)
    task.distiller = Distiller(RESNET, 2, checkpoint=weights)
    assert copy.deepcopy(task).distiller.teacher is task.distiller.teacher


def test_teacher_follows_the_precision_of_the_images(weights: Path) -> None:
    distiller = Distiller(RESNET, 2, checkpoint=weights)
    assert distiller.teacher_logits(IMAGES.double()).dtype == torch.float64
    assert distiller.teacher_logits(IMAGES).dtype == torch.float32


def test_teacher_sees_the_same_images_in_its_own_statistics(tmp_path: Path) -> None:
    path, model = write_teacher(tmp_path, VIT)
    distiller = Distiller(VIT, 2, checkpoint=path)
    pixels = torch.rand(2, 3, 160, 160, dtype=torch.float64)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = model.double()((pixels - 0.5) / 0.5)
    torch.testing.assert_close(distiller.teacher_logits((pixels - mean) / std), expected)


def test_statistics_of_the_data_can_be_told(tmp_path: Path) -> None:
    path, model = write_teacher(tmp_path, VIT)
    distiller = Distiller(VIT, 2, checkpoint=path)
    distiller.expect_images((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(distiller.teacher_logits(images), model(images))


def test_statistics_in_a_file_of_ours_count(tmp_path: Path) -> None:
    model = lightspine.create_model(RESNET, num_classes=2).eval()
    cfg = {"input_size": [3, 32, 32], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    path = save_checkpoint(model, tmp_path / "teacher.safetensors", preprocessing=cfg)
    distiller = Distiller(RESNET, 2, checkpoint=path)
    pixels = torch.rand(2, 3, 32, 32)
    distiller.expect_images((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    torch.testing.assert_close(distiller.teacher_logits((pixels - 0.4) / 0.2), model(pixels))


def test_teacher_sees_images_at_the_size_asked_for(tmp_path: Path) -> None:
    path, model = write_teacher(tmp_path)
    distiller = Distiller(RESNET, 2, checkpoint=path, image_size=48)
    distiller.expect_images((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = torch.randn(2, 3, 32, 32)
    larger = F.interpolate(images, size=(48, 48), mode="bicubic", antialias=True)
    assert torch.equal(distiller.teacher_logits(images), model(larger))


def test_teacher_of_one_size_names_it(tmp_path: Path) -> None:
    path, _ = write_teacher(tmp_path, "vit_tiny_patch16_224")
    distiller = Distiller("vit_tiny_patch16_224", 2, checkpoint=path)
    with pytest.raises(
        UsageError, match="expected images of 224 x 224 px for the teacher, got 32 x 32: set image_size=224"
    ):
        distiller.teacher_logits(IMAGES)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_model_of_ours_teaches(tmp_path: Path, suffix: str) -> None:
    model = lightspine.create_model("shvit_s1_dist", num_classes=2).eval()
    path = tmp_path / f"teacher.{suffix}"
    if suffix == "pth":
        torch.save({"model": model.state_dict()}, path)
    else:
        save_checkpoint(model, path)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(Distiller("shvit_s1_dist", 2, checkpoint=path).teacher_logits(images), model(images))


def test_further_arguments_reach_the_teacher(tmp_path: Path) -> None:
    model = lightspine.create_model("shvit_s1", num_classes=2, stem_stride=4).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    distiller = Distiller("shvit_s1", 2, checkpoint=tmp_path / "teacher.pth", teacher_args={"stem_stride": 4})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(distiller.teacher_logits(images), model(images))


@pytest.mark.parametrize(("name", "heads"), [("shvit_s1_dist", "two"), ("shvit_s1", "one")])
def test_student_trains_with_a_teacher(weights: Path, name: str, heads: Any) -> None:
    torch.manual_seed(0)
    student = lightspine.create_model(name, num_classes=2).train()
    distiller = Distiller(RESNET, 2, checkpoint=weights, kind="soft", heads=heads)
    distiller.prepare_student(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 2
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = distiller.loss(student(images), labels, images, F.cross_entropy)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_second_head_that_was_switched_off_is_switched_on(weights: Path) -> None:
    student = lightspine.create_model("efficientvim_m1_dist", num_classes=2).train()
    student.set_distilled_training(False)
    Distiller(RESNET, 2, checkpoint=weights).prepare_student(student)
    assert len(student(torch.randn(2, 3, 64, 64))) == 2


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [("shvit_s1", "two", "_dist variant"), ("shvit_s1_dist", "one", "plain variant")],
)
def test_student_with_the_wrong_number_of_heads_is_refused(
    weights: Path, name: str, heads: Any, message: str
) -> None:
    student = lightspine.create_model(name, num_classes=2)
    with pytest.raises(UsageError, match=message):
        Distiller(RESNET, 2, checkpoint=weights, heads=heads).prepare_student(student)


def test_output_with_the_wrong_number_of_heads_is_refused(weights: Path) -> None:
    with pytest.raises(UsageError, match="with two heads got the output of a model with one head"):
        Distiller(RESNET, 2, checkpoint=weights).loss(
            torch.zeros(2, 2), torch.tensor([0, 1]), IMAGES, F.cross_entropy
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, "the 3 classes of the data, but 'test_resnet' has 2"),
        ({"kind": "firm"}, "'hard' or 'soft', got 'firm'"),
        ({"heads": "three"}, "'two' or 'one', got 'three'"),
        ({"alpha": 1.5}, "from 0 to 1, got 1.5"),
        ({"temperature": 2.0}, "only for kind 'soft', got 2.0"),
        ({"kind": "soft", "temperature": 0.0}, "above 0, got 0.0"),
        ({"image_size": 0}, "at least 1 px for the teacher, got 0"),
        ({"teacher": "test_resnett"}, "test_resnet"),
        ({"checkpoint": "gone.pth"}, "no checkpoint file gone.pth"),
    ],
)
def test_wrong_argument_is_refused(weights: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Distiller(**{"teacher": RESNET, "num_classes": 2, "checkpoint": weights} | options)


def test_published_teacher_with_other_classes_is_refused_before_it_is_fetched() -> None:
    with pytest.raises(UsageError, match=r"10 classes of the data, but 'regnety_160\.deit_in1k' has 1000"):
        Distiller("regnety_160.deit_in1k", 10)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("regnety_160.no_such_tag", "no_such_tag"),
        ("efficientmod_s", r"no weights of efficientmod_s .* can be downloaded by a program"),
    ],
)
def test_teacher_without_weights_is_refused(teacher: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Distiller(teacher, 1000)


def test_unreachable_weights_are_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        LightspineError, match="cannot fetch the weights of the teacher 'test_resnet'"
    ) as caught:
        Distiller(RESNET, 1000)
    assert "\n" not in str(caught.value)


def test_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(lightspine.create_model(RESNET, num_classes=2), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"teacher 'test_vit', but .* holds 'test_resnet'"):
        Distiller(VIT, 2, checkpoint=path)


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pth"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(LightspineError, match="not a PyTorch checkpoint"):
        Distiller(RESNET, 2, checkpoint=path)


class Fixed(nn.Module):
    """Module with fixed logits, which differ in training mode."""

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
def test_wrong_setting_of_mesa_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mesa(**options)
