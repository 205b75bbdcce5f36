"""Knowledge distillation from a frozen teacher, and MESA self-distillation from the EMA model.

Sources: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML
2021, arXiv:2012.12877, as in the official EfficientViM and SHViT; Hinton et al., "Distilling the Knowledge in
a Neural Network", arXiv:1503.02531, as in the official EfficientMod; Du et al., "Sharpness-aware training for
free", NeurIPS 2022, arXiv:2205.14083, as in the official EfficientViM.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import Checkpoint, read_checkpoint
from lightspine.models.factory import create_model, load_model
from lightspine.models.loading import load_checkpoint
from lightspine.models.metadata import read_model_metadata
from lightspine.models.registry import find_record, find_timm_cfg, timm_name

Kind = Literal["hard", "soft"]
Heads = Literal["two", "one"]
Output = Tensor | tuple[Tensor, Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class Distiller:
    """Distillation loss with a frozen teacher.

    With a = `alpha`, t = `temperature` and logits of shape (N, K), the loss is (1 - a) base + a T, where T is

    - "hard": the cross-entropy with the teacher's argmax;
    - "soft" with two heads: t^2 KL(teacher / t, student / t), summed and divided by N K, as in DeiT;
    - "soft" with one head: the same divergence divided by N, as in EfficientMod.

    With two heads the student returns a pair of logits (the `_dist` models of EfficientViM and SHViT): the
    base loss uses the first and T the second. With one head both use the same logits.

    The teacher is not a submodule of the task: it is not saved, trained, or wrapped by DDP, and stays in
    evaluation mode. It moves to the device and dtype of the images.

    Args:
        teacher: model name in lightspine or timm, with timm's weight tag (`regnety_160.deit_in1k`).
        num_classes: number of classes of the student.
        kind: distill the teacher's predicted class ("hard") or its probabilities ("soft").
        alpha: weight of the distillation loss, from 0 to 1.
        temperature: softmax temperature, only for "soft".
        heads: number of heads that the student has in training.
        checkpoint: file of the teacher's weights. By default timm's pretrained weights are downloaded.
        teacher_args: further arguments of the teacher model.
        image_size: side in pixels to which images are resized for the teacher; None does not resize them.

    Raises:
        UsageError: the teacher is unknown or has another number of classes, or a value is out of range.
        LightspineError: the teacher's weights cannot be read or downloaded.
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
        _check_settings(kind, alpha, temperature, heads, image_size)
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
        """Return the distiller itself, so that copies of a task, such as its EMA, share one teacher."""
        return self

    def expect_images(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the normalization of the student's input images; the default is ImageNet's.

        If the teacher was trained with another normalization, the images are renormalized for it.

        Args:
            mean: mean per channel, for pixel values from 0 to 1.
            std: standard deviation per channel.
        """
        # ((x * std + mean) - teacher_mean) / teacher_std, as one factor and one shift per channel.
        pairs = zip(mean, std, self._teacher_mean, self._teacher_std, strict=True)
        self._factor_and_shift = [(s / ts, (m - tm) / ts) for m, s, tm, ts in pairs]
        self._moved: tuple[torch.device, torch.dtype, Tensor] | None = None

    def prepare_student(self, model: nn.Module) -> None:
        """Check the number of heads of the student, and enable the output of both heads in training.

        Raises:
            UsageError: the number of heads differs from `heads`.
        """
        second = getattr(model, "head_dist", None)
        two = second is not None and not isinstance(second, nn.Identity)
        if two != (self.heads == "two"):
            advice = (
                "use its _dist variant or heads='one'"
                if self.heads == "two"
                else "use its plain variant or heads='two'"
            )
            raise UsageError(
                f"distillation with {_heads_text(self.heads == 'two')} got a model with {_heads_text(two)}: "
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
            output: output of the student in training: logits (N, K), or with two heads a pair of them.
            targets: targets of `base_loss`: class indices (N,) or class probabilities (N, K).
            images: input of the student, (N, C, H, W), after mixup or CutMix.
            base_loss: maps (logits, targets) to the loss without a teacher.

        Raises:
            UsageError: the number of heads differs from `heads`, or the teacher's fixed input size differs.
        """
        if isinstance(output, Tensor) != (self.heads == "one"):
            raise UsageError(
                f"distillation with {_heads_text(self.heads == 'two')} got the output of a model with "
                f"{_heads_text(not isinstance(output, Tensor))}"
            )
        logits, student = (output, output) if isinstance(output, Tensor) else output
        distillation = self._distillation_loss(student, self.teacher_logits(images))
        return (1 - self.alpha) * base_loss(logits, targets) + self.alpha * distillation

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (N, K) for the student's images (N, C, H, W).

        Raises:
            UsageError: the teacher has a fixed input size that differs.
        """
        factor, shift = self._move_to(images.device, images.dtype)
        if self.image_size is not None and tuple(images.shape[2:]) != (self.image_size, self.image_size):
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bicubic", antialias=True
            )
        self._check_image_size(images)
        if any(pair != (1.0, 0.0) for pair in self._factor_and_shift):
            images = images * factor + shift
        return self.teacher(images)

    def _move_to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Move the teacher to a device and dtype; return the factors and shifts (2, C, 1, 1) there."""
        # The teacher is not a submodule, so Lightning does not move it. Once, and not for every batch: a copy
        # to the device would wait for it.
        if self._moved is None or self._moved[:2] != (device, dtype):
            self.teacher.to(device=device, dtype=dtype)
            table = torch.tensor(self._factor_and_shift, device=device, dtype=dtype).T[..., None, None]
            self._moved = device, dtype, table
        return self._moved[2]

    def _check_image_size(self, images: Tensor) -> None:
        cfg = getattr(self.teacher, "pretrained_cfg", None) or {}
        embed = getattr(self.teacher, "patch_embed", None)
        size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", True) else None
        if cfg.get("fixed_input_size") and size is not None and tuple(images.shape[2:]) != tuple(size):
            raise UsageError(
                f"expected images of {size[0]} x {size[1]} px for the teacher, got {images.shape[2]} x "
                f"{images.shape[3]}: set image_size={size[0]}"
            )

    def _distillation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(1))
        # Small probabilities would underflow in half precision.
        wide = torch.promote_types(student.dtype, torch.float32)
        divergence = F.kl_div(
            F.log_softmax(student.to(wide) / self.temperature, dim=1),
            F.log_softmax(teacher.to(wide) / self.temperature, dim=1),
            reduction="sum",
            log_target=True,
        )
        # DeiT divides by the number of logits, EfficientMod by the batch size.
        share = student.numel() if self.heads == "two" else len(student)
        return divergence * self.temperature**2 / share


class Mesa:
    """MESA loss: `weight` times the soft cross-entropy with the EMA model on the same images.

    The published EfficientViM recipe starts it after a quarter of the epochs and without a teacher.

    Args:
        start: fraction of the epochs before the loss starts, from 0 to 1.
        weight: factor of the loss.

    Raises:
        UsageError: a value is out of range.
    """

    def __init__(self, start: float = 0.25, weight: float = 1.0) -> None:
        if not 0 <= start <= 1:
            raise UsageError(f"expected MESA to start at a fraction from 0 to 1, got {start}")
        if weight <= 0:
            raise UsageError(f"expected a weight of MESA above 0, got {weight}")
        self.start = start
        self.weight = weight

    def is_active(self, epoch: int, epochs: int) -> bool:
        """Return whether the loss is active in an epoch.

        Args:
            epoch: epoch, from 0.
            epochs: length of the schedule without cool-down epochs, as in the official code.
        """
        return epoch >= int(self.start * epochs)

    def loss(self, student_logits: Tensor, ema_model: nn.Module, images: Tensor) -> Tensor:
        """Return the weighted loss of a batch; gradients reach only the student.

        Args:
            student_logits: (N, K), with gradient.
            ema_model: the EMA model; this method puts it in evaluation mode.
            images: input of the student, (N, C, H, W), after mixup or CutMix.

        Raises:
            UsageError: the student has two heads.
        """
        if not isinstance(student_logits, Tensor):
            raise UsageError("MESA needs a student with one head, got the output of one with two heads")
        with torch.no_grad():
            averaged = ema_model.eval()(images)
        # Small probabilities would underflow in half precision.
        wide = torch.promote_types(student_logits.dtype, torch.float32)
        return self.weight * F.cross_entropy(student_logits.to(wide), averaged.to(wide).softmax(1))


def create_teacher(
    name: str, num_classes: int, *, checkpoint: str | Path | None, model_args: dict[str, Any]
) -> tuple[nn.Module, Statistics]:
    """Create a frozen teacher in evaluation mode.

    Args:
        name: model of lightspine or timm, with or without timm's weight tag.
        num_classes: number of classes that the teacher must have.
        checkpoint: file of the weights. By default timm's pretrained weights are downloaded.
        model_args: further arguments of the model.

    Returns:
        The model, and the (mean, std) of its image normalization.

    Raises:
        UsageError: the name is unknown, there are no weights, or the number of classes differs.
        LightspineError: the weights cannot be read or downloaded, or are for another model.
    """
    # Creating the teacher must not change the random initialization of the student.
    with torch.random.fork_rng(devices=[]):
        if checkpoint is None:
            model, config = _pretrained_teacher(name, num_classes, model_args)
        else:
            model, config = _teacher_from_file(name, checkpoint, model_args)
    _check_num_classes(name, model.num_classes, num_classes)
    statistics = (
        tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN),
        tuple(config.get("std") or IMAGENET_DEFAULT_STD),
    )
    return model.eval().requires_grad_(False), statistics


def _pretrained_teacher(
    name: str, num_classes: int, model_args: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    options = {"pretrained": True} | model_args
    if options["pretrained"] and timm_name(name) is not None:
        try:
            cfg = find_timm_cfg(name)
        except RuntimeError as error:
            raise UsageError(f"expected a pretrained teacher of timm, got {name!r}: {error}") from error
        if cfg is None or not cfg.has_weights:
            raise UsageError(f"timm publishes no weights for the teacher {name!r}: give a checkpoint")
        if "num_classes" not in options:
            # Check before a large download.
            _check_num_classes(name, cfg.num_classes, num_classes)
    try:
        model: Any = create_model(name, **options)
    # huggingface_hub raises OSError subclasses without a connection and for missing files.
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise LightspineError(f"cannot fetch the weights of the teacher {name!r}: {reason}") from error
    return model, model.pretrained_cfg


def _teacher_from_file(
    name: str, checkpoint: str | Path, model_args: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    file = read_checkpoint(checkpoint)
    saved = read_model_metadata(file)
    if saved is not None and saved.name != name:
        raise UsageError(f"expected weights of the teacher {name!r}, but {file.label} holds {saved.name!r}")
    if saved is not None or find_record(name) is not None:
        # The file's metadata has the number of classes, sizes and preprocessing.
        loaded, saved = load_model(file, name=name, **model_args)
        return loaded, saved.preprocessing
    options = _num_classes_in_file(name, file) | model_args
    model: Any = create_model(name, **options)
    load_checkpoint(model, file, drop_head=False)
    return model, model.pretrained_cfg


def _num_classes_in_file(name: str, file: Checkpoint) -> dict[str, Any]:
    """Return the model argument `num_classes` of a timm checkpoint, from the shape of its classifier."""
    cfg = find_timm_cfg(name)
    classifier = cfg.classifier if cfg is not None else None
    first = classifier[0] if isinstance(classifier, tuple | list) else classifier
    weight = next(iter(file.entries.values())).get(f"{first}.weight")
    return {} if weight is None else {"num_classes": int(weight.shape[0])}


def _check_num_classes(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise UsageError(
            f"expected a teacher with the {expected} classes of the data, but {name!r} has {found}"
        )


def _heads_text(two: bool) -> str:
    return "two heads" if two else "one head"


def _check_settings(kind: str, alpha: float, temperature: float, heads: str, image_size: int | None) -> None:
    if kind not in ("hard", "soft"):
        raise UsageError(f"expected distillation of kind 'hard' or 'soft', got {kind!r}")
    if heads not in ("two", "one"):
        raise UsageError(f"expected distillation with heads 'two' or 'one', got {heads!r}")
    if not 0 <= alpha <= 1:
        raise UsageError(f"expected alpha from 0 to 1, got {alpha}")
    if temperature <= 0:
        raise UsageError(f"expected a temperature above 0, got {temperature}")
    if kind == "hard" and temperature != 1:
        raise UsageError(f"expected a temperature only for kind 'soft', got {temperature} for 'hard'")
    if image_size is not None and image_size < 1:
        raise UsageError(f"expected an image_size of at least 1 px for the teacher, got {image_size}")
