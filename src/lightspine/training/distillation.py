"""Learning from a teacher: the hard and soft losses of DeiT with two heads, or a soft one on a single head.

Sources: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML
2021, arXiv:2012.12877, as the official EfficientViM and SHViT use it; Hinton et al., "Distilling the
Knowledge in a Neural Network", arXiv:1503.02531, as the official EfficientMod does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import Checkpoint, read_checkpoint, read_model_metadata
from lightspine.models.factory import create_model, load_model
from lightspine.models.loading import load_checkpoint
from lightspine.models.registry import find_record

Kind = Literal["hard", "soft"]
Heads = Literal["two", "one"]
Output = Tensor | tuple[Tensor, Tensor]


class Distiller:
    """Adds to a loss what a frozen teacher says about the same images.

    With a the share `alpha`, t the temperature and N x K logits, the loss is (1 - a) base + a T, where T is

    - "hard": the cross-entropy with the teacher's decision;
    - "soft" with two heads: t^2 KL(teacher / t, student / t), summed and divided by N K, as in DeiT;
    - "soft" with one head: the same divergence divided by N, as in EfficientMod.

    With two heads the base loss reads the first and T the second of a pair of logits (EfficientViM's and
    SHViT's `_dist` models); with one head both read the same logits.

    The teacher is no part of the task: it is not saved, not trained, not wrapped for several devices, and
    stays in evaluation mode. It moves to where the images are.

    Args:
        teacher: name of a model of lightspine or timm, with timm's tag of its weights where it is timm's
            (`regnety_160.deit_in1k`).
        num_classes: number of classes of the student.
        kind: learn the teacher's decisions or its probabilities.
        alpha: share of the teacher's part, from 0 to 1.
        temperature: softens both distributions of "soft"; of no effect on "hard" and refused there.
        heads: how many heads the student has in training.
        checkpoint: a file of the teacher's weights, read safely; without it timm's published ones.
        teacher_args: further arguments of the teacher.
        image_size: side in pixels at which the teacher sees the images; without it as the student does.

    Raises:
        UsageError: an unknown teacher, one with another number of classes, or a value out of its range.
        LightspineError: the teacher's weights cannot be read or fetched.
    """

    def __init__(
        self,
        teacher: str,
        num_classes: int,
        *,
        kind: Kind = "hard",
        alpha: float = 0.5,
        temperature: float = 1.0,
        heads: Heads = "two",
        checkpoint: str | Path | None = None,
        teacher_args: dict[str, Any] | None = None,
        image_size: int | None = None,
    ) -> None:
        _check(kind, alpha, temperature, heads, image_size)
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature
        self.heads = heads
        self.image_size = image_size
        self.teacher, statistics = create_teacher(
            teacher, num_classes, checkpoint=checkpoint, model_args=teacher_args or {}
        )
        self._teacher_mean, self._teacher_std = statistics
        self.expect_images(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distiller":
        """Return the distiller itself: a copy of a task, such as its average, shares the one teacher."""
        return self

    def expect_images(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell by which statistics the student's images are normalised; ImageNet's are assumed otherwise.

        Where the teacher was trained with others, each image is brought to those before it sees it.

        Args:
            mean: per channel, of values from 0 to 1.
            std: per channel, of values from 0 to 1.
        """
        # ((x * std + mean) - teacher_mean) / teacher_std, as one factor and one shift per channel.
        pairs = zip(mean, std, self._teacher_mean, self._teacher_std, strict=True)
        self._factor_and_shift = [(s / ts, (m - tm) / ts) for m, s, tm, ts in pairs]

    def prepare_student(self, model: nn.Module) -> None:
        """Let a student with two heads return both in training, or refuse one with the wrong number.

        Raises:
            UsageError: the model has another number of heads than `heads`.
        """
        second = getattr(model, "head_dist", None)
        two = second is not None and not isinstance(second, nn.Identity)
        if two != (self.heads == "two"):
            advice = (
                "take its _dist variant or heads='one'"
                if self.heads == "two"
                else "take its plain variant or heads='two'"
            )
            raise UsageError(
                f"distillation with {_in_words(self.heads == 'two')} got a model with {_in_words(two)}: "
                f"{advice}"
            )
        enable = getattr(model, "set_distilled_training", None)
        if two and callable(enable):
            enable(True)

    def loss(
        self,
        output: Output,
        targets: Tensor,
        images: Tensor,
        base_loss: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the loss of a batch.

        Args:
            output: what the student returned in training: (logits, logits for the teacher), each (N, K), or
                with one head logits (N, K).
            targets: what `base_loss` compares with: classes (N,) or shares (N, K).
            images: what the student saw, (N, C, H, W), mixed or not.
            base_loss: (logits, targets) -> loss without a teacher.

        Raises:
            UsageError: the output does not have as many heads as expected, or the teacher cannot take the
                images' size.
        """
        if isinstance(output, Tensor) != (self.heads == "one"):
            raise UsageError(
                f"distillation with {_in_words(self.heads == 'two')} got the output of a model with "
                f"{_in_words(not isinstance(output, Tensor))}"
            )
        logits, student = (output, output) if isinstance(output, Tensor) else output
        taught = self._teacher_loss(student, self.ask_teacher(images))
        return (1 - self.alpha) * base_loss(logits, targets) + self.alpha * taught

    @torch.no_grad()
    def ask_teacher(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (N, K) for images (N, C, H, W) as the student sees them.

        Raises:
            UsageError: the teacher takes one size only, and it is another.
        """
        # The student's images decide where the teacher lives: nothing else knows of it, so nothing moves it.
        self.teacher.to(device=images.device, dtype=images.dtype)
        factor, shift = images.new_tensor(self._factor_and_shift).T[..., None, None]
        if self.image_size is not None and tuple(images.shape[2:]) != (self.image_size, self.image_size):
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bicubic", antialias=True
            )
        self._check_size(images)
        if any(pair != (1.0, 0.0) for pair in self._factor_and_shift):
            images = images * factor + shift
        return self.teacher(images)

    def _check_size(self, images: Tensor) -> None:
        cfg = getattr(self.teacher, "pretrained_cfg", None) or {}
        embed = getattr(self.teacher, "patch_embed", None)
        size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", True) else None
        if cfg.get("fixed_input_size") and size is not None and tuple(images.shape[2:]) != tuple(size):
            raise UsageError(
                f"the teacher takes images of {size[0]} x {size[1]} px only, got {images.shape[2]} x "
                f"{images.shape[3]}: set image_size={size[0]}"
            )

    def _teacher_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(1))
        # Half precision would lose the small probabilities that "soft" is about.
        wide = torch.promote_types(student.dtype, torch.float32)
        divergence = F.kl_div(
            F.log_softmax(student.to(wide) / self.temperature, dim=1),
            F.log_softmax(teacher.to(wide) / self.temperature, dim=1),
            reduction="sum",
            log_target=True,
        )
        # The published scripts differ here, by a factor of the number of classes.
        share = student.numel() if self.heads == "two" else len(student)
        return divergence * self.temperature**2 / share


def _in_words(two: bool) -> str:
    return "two heads" if two else "one head"


def _check(kind: str, alpha: float, temperature: float, heads: str, image_size: int | None) -> None:
    if kind not in ("hard", "soft"):
        raise UsageError(f"expected distillation of kind 'hard' or 'soft', got {kind!r}")
    if heads not in ("two", "one"):
        raise UsageError(f"expected distillation with heads 'two' or 'one', got {heads!r}")
    if not 0 <= alpha <= 1:
        raise UsageError(f"expected a share alpha of the teacher from 0 to 1, got {alpha}")
    if temperature <= 0:
        raise UsageError(f"expected a temperature above 0, got {temperature}")
    if kind == "hard" and temperature != 1:
        raise UsageError(f"a temperature belongs to kind 'soft': got {temperature} with 'hard'")
    if image_size is not None and image_size < 1:
        raise UsageError(f"expected an image_size of at least 1 px for the teacher, got {image_size}")


Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def create_teacher(
    name: str, num_classes: int, *, checkpoint: str | Path | None, model_args: dict[str, Any]
) -> tuple[nn.Module, Statistics]:
    """Build a frozen teacher in evaluation mode.

    Args:
        name: a model of lightspine, or of timm with or without the tag of its weights.
        num_classes: number of classes that it must tell apart.
        checkpoint: a file of its weights; without it timm's published ones are fetched.
        model_args: further arguments of the model.

    Returns:
        The model, and the (mean, std) by which its images are normalised.

    Raises:
        UsageError: an unknown name, no weights to have, or another number of classes.
        LightspineError: the weights cannot be read or fetched, or are of another model.
    """
    # What is drawn for weights that are then replaced must not change what is drawn for the student.
    with torch.random.fork_rng(devices=[]):
        if checkpoint is None:
            model, config = _published(name, num_classes, model_args)
        else:
            model, config = _from_file(name, checkpoint, model_args)
    _check_classes(name, model.num_classes, num_classes)
    statistics = (
        tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN),
        tuple(config.get("std") or IMAGENET_DEFAULT_STD),
    )
    return model.eval().requires_grad_(False), statistics


def _published(name: str, num_classes: int, model_args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    options = {"pretrained": True} | model_args
    if options["pretrained"] and find_record(name) is None and timm.is_model(name):
        try:
            cfg = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            raise UsageError(f"expected a teacher that timm publishes, got {name!r}: {error}") from error
        if cfg is None or not cfg.has_weights:
            raise UsageError(f"timm publishes no weights for the teacher {name!r}: give a checkpoint")
        if "num_classes" not in options:
            # Before a gigabyte is fetched for nothing.
            _check_classes(name, cfg.num_classes, num_classes)
    try:
        model: Any = create_model(name, **options)
    # The hub's errors for no connection and for no such file are both of this kind.
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise LightspineError(f"cannot fetch the weights of the teacher {name!r}: {reason}") from error
    return model, model.pretrained_cfg


def _from_file(name: str, checkpoint: str | Path, model_args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    file = read_checkpoint(checkpoint)
    saved = read_model_metadata(file)
    if saved is not None and saved.name != name:
        raise UsageError(f"expected weights of the teacher {name!r}, but {file.label} is of {saved.name!r}")
    if saved is not None or find_record(name) is not None:
        # The file tells its own number of classes, sizes and preprocessing.
        loaded, saved = load_model(file, name=name, **model_args)
        return loaded, saved.preprocessing
    options = _count_classes(name, file) | model_args
    model: Any = create_model(name, **options)
    load_checkpoint(model, file, drop_head=False)
    return model, model.pretrained_cfg


def _count_classes(name: str, file: Checkpoint) -> dict[str, Any]:
    """Return the width of the classifier in a file of timm's layout, where it has one."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    classifier = cfg.classifier if cfg is not None else None
    first = classifier[0] if isinstance(classifier, tuple | list) else classifier
    weight = next(iter(file.entries.values())).get(f"{first}.weight")
    return {} if weight is None else {"num_classes": int(weight.shape[0])}


def _check_classes(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise UsageError(
            f"expected a teacher with the {expected} classes of the data, but {name!r} has {found}"
        )


class Mesa:
    """Adds `weight` times the soft cross-entropy with the averaged (EMA) model on the same images.

    The published recipe has it on from a quarter of the epochs, and never together with a teacher.

    Args:
        start: share of the epochs before it begins, from 0 to 1.
        weight: factor of its loss.

    Raises:
        UsageError: a value out of its range.
    """

    def __init__(self, start: float = 0.25, weight: float = 1.0) -> None:
        if not 0 <= start <= 1:
            raise UsageError(f"expected MESA to start at a share of the epochs from 0 to 1, got {start}")
        if weight <= 0:
            raise UsageError(f"expected a weight of MESA above 0, got {weight}")
        self.start = start
        self.weight = weight

    def is_active(self, epoch: int, epochs: int) -> bool:
        """Return whether the loss counts in an epoch.

        Args:
            epoch: number of the epoch, from 0.
            epochs: length of the schedule, without the epochs of a cool-down, which the official code
                does not count either.
        """
        return epoch >= int(self.start * epochs)

    def loss(self, student_logits: Tensor, ema_model: nn.Module, images: Tensor) -> Tensor:
        """Return the weighted loss of a batch; the gradient reaches the student only.

        Args:
            student_logits: (N, K), with gradient.
            ema_model: the averaged model; is put into evaluation mode, in which it belongs.
            images: what the student saw, (N, C, H, W), mixed or not.

        Raises:
            UsageError: the student returned more than one tensor of logits.
        """
        if not isinstance(student_logits, Tensor):
            raise UsageError("MESA needs a student with one head, got the output of one with two heads")
        with torch.no_grad():
            averaged = ema_model.eval()(images)
        # Probabilities as targets; half precision would lose the small ones.
        wide = torch.promote_types(student_logits.dtype, torch.float32)
        return self.weight * F.cross_entropy(student_logits.to(wide), averaged.to(wide).softmax(1))
