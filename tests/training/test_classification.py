"""Classification task: loss, schedule, parameter groups and invalid arguments."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import lightspine
from lightspine.data import Augmentation
from lightspine.data.dataset import Batch
from lightspine.data.modules import DigitsDataModule, ImageFolderDataModule
from lightspine.errors import UsageError
from lightspine.training.classification import ClassificationTask
from lightspine.training.fit import train
from support.images import write_folder
from support.training import make_task


@pytest.mark.parametrize("options", [{}, {"mixup": 0.2}, {"cutmix": 1.0}, {"label_smoothing": 0.1}])
def test_optimizer_steps_lower_the_loss(options: dict[str, float]) -> None:
    task = make_task(**options)
    images, labels, _ = next(iter(DigitsDataModule(batch_size=32, augment=False).val_dataloader()))
    # Overfit one batch; evaluated without mixup.
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)

    def clean_loss() -> float:
        return torch.nn.functional.cross_entropy(task(images), labels).detach().item()

    before = clean_loss()
    for _ in range(5):
        optimizer.zero_grad()
        mixed, targets = task.mix(images.clone(), labels) if task.mix else (images, labels)
        task.training_loss(mixed, targets).backward()
        optimizer.step()
    assert clean_loss() < before


def test_both_heads_of_a_distilled_model_are_trained() -> None:
    task = make_task(model="efficientvim_m1_dist")
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    first, second = task(images)
    expected = sum(torch.nn.functional.cross_entropy(head, labels) for head in (first, second)) / 2
    torch.testing.assert_close(task.training_loss(images, labels), expected)


def test_model_is_the_same_for_the_same_seed_only() -> None:
    torch.manual_seed(1)
    first = make_task(seed=3).state_dict()
    torch.manual_seed(2)
    again, other = make_task(seed=3).state_dict(), make_task(seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_creating_a_task_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    make_task()
    assert torch.equal(torch.rand(1), expected)


def test_top5_is_measured_only_with_more_than_five_classes() -> None:
    assert make_task(num_classes=5).top5 is None
    assert make_task(num_classes=6).top5 is not None


def test_starting_from_a_checkpoint_renews_only_the_classifier(tmp_path) -> None:
    source = lightspine.create_model("shvit_s1", num_classes=7)
    torch.save({"model": source.state_dict()}, tmp_path / "source.pth")
    task = make_task(model="shvit_s1", num_classes=3, checkpoint=tmp_path / "source.pth")
    kept = [
        key
        for key, value in source.state_dict().items()
        if torch.equal(task.model.state_dict().get(key), value)
    ]
    renewed = {key.split(".")[0] for key in set(source.state_dict()) - set(kept)}
    assert renewed == {"head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vim_tinny"}, "vim_tiny"),
        ({"num_classes": 1}, "at least 2 classes, got 1"),
        ({"lr": 0.0}, "learning rate above 0, got 0.0"),
        ({"warmup_epochs": -1}, "warmup_epochs of at least 0, got -1"),
        ({"label_smoothing": 1.0}, "label_smoothing from 0 to below 1, got 1.0"),
    ],
)
def test_wrong_argument_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_task(**options)


def test_batch_of_bad_images_only_is_not_counted_in_validation() -> None:
    task: ClassificationTask = make_task()
    task.validation_step(Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), []), 0)
    assert not task.top1.update_called
    assert math.isfinite(float(task.lr))


def test_images_that_are_erased_after_mixing_reach_the_model_normalized(tmp_path: Path) -> None:
    data = ImageFolderDataModule(
        write_folder(tmp_path / "images", splits=("train", "val")),
        image_size=32,
        batch_size=8,
        num_workers=0,
        augmentation=Augmentation(auto_augment=None, erasing_after_mixing=True),
    )
    task = make_task(num_classes=3, mixup=0.8, cutmix=1.0)
    received: list[torch.Tensor] = []
    task.model.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    result = train(task, data, folder=tmp_path / "run", epochs=1, accelerator="cpu", progress=False)
    assert all(images.dtype == torch.float32 and images.abs().max() < 10 for images in received)
    assert math.isfinite(result.history[0]["train_loss"])


def test_uint8_images_without_a_transform_are_refused(tmp_path: Path) -> None:
    class Raw(DigitsDataModule):
        def train_dataloader(self) -> DataLoader:
            images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
            return DataLoader([Batch(images, torch.zeros(8, dtype=torch.int64), [])], batch_size=None)

    with pytest.raises(UsageError, match="expected normalized images, got uint8"):
        train(make_task(), Raw(), folder=tmp_path, epochs=1, accelerator="cpu", progress=False)
