"""Base class of the detection and segmentation tasks: model creation, optimizer groups, logging."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightspine.data.modules import ImageDataModule
from lightspine.dense import DenseNetwork, feature_backbone
from lightspine.dense.checkpoint import network_metadata
from lightspine.errors import LightspineError, UsageError
from lightspine.heads.features import MapNorm
from lightspine.models.checkpoint import Weights
from lightspine.training.base import LightspineTask
from lightspine.training.optim import dense_parameter_groups, optimizer_from_groups


class DenseTask(LightspineTask):
    """Base class of tasks that train a backbone with a detection or segmentation head.

    Args:
        create: `create_detector` or `create_segmenter`.
        head: name of the head.
        model: model name of the backbone.
        num_classes: number of classes; the command line sets it from the data.
        model_args: further arguments of the backbone, such as `drop_path_rate`.
        checkpoint: initial weights: a classifier of the backbone, or a detector or segmenter with the same
            head and backbone.
        weights: which weights of a classifier's file to load: "model", "ema" or "auto"; see
            `lightspine.dense.create_detector`.
        norm: norm over each feature map; see `lightspine.heads.FeatureBackbone`.
            Default: that of a detector or segmenter's checkpoint, else "none".
        freeze_batch_norm: keep the BatchNorm layers of the backbone in evaluation mode. Default: as in
            a detector or segmenter's checkpoint, else False.
        head_args: arguments of the head.
        undecayed: substrings of the names of parameters without weight decay; see
            `lightspine.training.optim.dense_parameter_groups`.
        layer_decay_blocks: apply `layer_decay` to blocks too, not only to the stem.
        **options: optimizer, schedule, clipping, EMA and seed; see `LightspineTask`.

    Raises:
        UsageError: a name is unknown or a value is out of range.
        LightspineError: the checkpoint cannot be read or does not fit.
    """

    def __init__(
        self,
        create: Callable[..., DenseNetwork],
        head: str,
        model: str,
        num_classes: int,
        *,
        model_args: dict[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        weights: Weights = "auto",
        norm: MapNorm | None = None,
        freeze_batch_norm: bool | None = None,
        head_args: dict[str, Any],
        undecayed: Sequence[str] | None = None,
        layer_decay_blocks: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model_name = f"{head} over {model}"
        self.num_classes = num_classes
        self.undecayed = None if undecayed is None else tuple(undecayed)
        self.layer_decay_blocks = layer_decay_blocks
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = create(
                head,
                model,
                num_classes,
                checkpoint=checkpoint,
                weights=weights,
                model_args=model_args,
                norm=norm,
                freeze_batch_norm=freeze_batch_norm,
                frozen_stages=self.frozen_stages,
                **head_args,
            )

    @property
    def network(self) -> Any:
        """The detector or segmenter."""
        return self.model

    @property
    def backbone(self) -> nn.Module:
        """The backbone without timm's `features_only` wrapper; it has `set_grad_checkpointing`."""
        wrapper: nn.Module = feature_backbone(self.network).model
        return cast(nn.Module, getattr(wrapper, "model", wrapper))

    def settings(self, data: ImageDataModule) -> dict[str, Any]:  # noqa: ARG002  for subclasses
        """Return the inference settings that are saved with the model."""
        return {}

    def model_metadata(self, data: ImageDataModule) -> dict[str, str]:
        """Return the names and arguments of head and backbone, the class names and the inference settings."""
        return network_metadata(
            self.network,
            class_names=data.class_names,
            preprocessing={"mean": list(data.preprocessing.mean), "std": list(data.preprocessing.std)},
            settings=self.settings(data),
        )

    def create_optimizer(self, *, fused: bool) -> torch.optim.Optimizer:
        """Create the optimizer with the parameter groups of `dense_parameter_groups`."""
        groups = dense_parameter_groups(
            self.network,
            lr=self.lr,
            weight_decay=self.weight_decay,
            undecayed=self.undecayed,
            layer_decay=self.layer_decay,
            layer_decay_blocks=self.layer_decay_blocks,
        )
        return optimizer_from_groups(groups, self.optimizer_name, lr=self.lr, fused=fused)

    def log_losses(self, losses: dict[str, Tensor], images: int) -> Tensor:
        """Log the terms of the loss and return their sum."""
        loss = torch.stack(list(losses.values())).sum()
        parts = {name if name.startswith("loss_") else f"loss_{name}": v for name, v in losses.items()}
        self.log_train_losses(
            {"train_loss": loss} | {f"train_{name}": value for name, value in parts.items()}, images
        )
        return loss

    def log_scores(self, scores: dict[str, float | None]) -> None:
        """Log validation metrics; None marks a metric without data."""
        for name, value in scores.items():
            if value is not None:
                self.log(f"val_{name}", value, prog_bar=f"val_{name}" == self.score, sync_dist=True)

    def check_validated(self, images: int) -> None:
        """Raise LightspineError if none of the validation images could be used."""
        self.log_bad_images()
        if not images:
            reason = next(iter(self.bad_images.reasons.values()), "the validation split is empty")
            raise LightspineError(f"none of the validation images can be used; {reason}")

    def data_module(self, kind: type[ImageDataModule]) -> Any:
        """Return the data module of the run.

        Raises:
            UsageError: it is not an instance of `kind`.
        """
        data = getattr(self.trainer, "datamodule", None)
        self.check_data(data, kind)
        return data

    def check_data(self, data: Any, kind: type[ImageDataModule]) -> None:
        """Check the type of the data module.

        Raises:
            UsageError: it is not an instance of `kind`.
        """
        if not isinstance(data, kind):
            raise UsageError(
                f"expected a {kind.__name__} to train {self.model_name}, got {type(data).__name__}"
            )
