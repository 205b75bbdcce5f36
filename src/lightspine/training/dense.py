"""What the training of detectors and of segmenters does alike: the network's creation and its optimiser."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightspine.data.modules import ImageDataModule
from lightspine.dense import DenseNetwork, feature_backbone, save_network
from lightspine.errors import LightspineError, UsageError
from lightspine.heads.features import MapNorm
from lightspine.models.checkpoint import Weights
from lightspine.training.base import LightspineTask
from lightspine.training.optim import dense_parameter_groups, optimizer_from_groups


class DenseTask(LightspineTask):
    """A model with a head of any of the dense tasks in training.

    Args:
        create: `create_detector` or `create_segmenter`.
        head: name of the head.
        model: name of the model that gives the maps.
        num_classes: number of classes; the command line takes it from the data.
        model_args: further arguments of the model, such as `drop_path_rate`.
        checkpoint: weights to start from: of the model's classifier, or a detector or segmenter of the same
            head and model.
        weights: which entry of a classifier's file: "model", "ema" or "auto"; see `create_detector`.
        norm: see `lightspine.heads.FeatureBackbone`, also for what the papers set.
        freeze_batch_norm: likewise.
        head_args: arguments of the head.
        undecayed: see `lightspine.training.optim.dense_parameter_groups`.
        layer_decay_blocks: likewise.
        **options: see `LightspineTask`: optimiser, schedule, clipping, average, seed.

    Raises:
        UsageError: an unknown name, a value out of its range.
        LightspineError: a checkpoint that cannot be read or does not fit.
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
        norm: MapNorm = "none",
        freeze_batch_norm: bool = False,
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
        """The model without its wrapper, which recomputes activations where that is asked for."""
        wrapper: nn.Module = feature_backbone(self.network).model
        return cast(nn.Module, getattr(wrapper, "model", wrapper))

    def settings(self, data: ImageDataModule) -> dict[str, Any]:  # noqa: ARG002  for what derives from it
        """Return how the network looks at images outside training, for its file."""
        return {}

    def save(self, path: Path, data: ImageDataModule, metadata: dict[str, str]) -> None:
        """Write the network as a file for `lightspine.dense.load_network`."""
        save_network(
            self.network,
            path,
            class_names=data.class_names,
            preprocessing={"mean": list(data.preprocessing.mean), "std": list(data.preprocessing.std)},
            settings=self.settings(data),
            metadata=metadata,
        )

    def create_optimizer(self, *, fused: bool) -> torch.optim.Optimizer:
        """Return the optimiser with the groups of `dense_parameter_groups`."""
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
        """Log the parts of the loss and return their sum."""
        loss = torch.stack(list(losses.values())).sum()
        # A bad one is skipped by the guard, and would spoil the mean of the epoch.
        if torch.isfinite(loss):
            parts = {name if name.startswith("loss_") else f"loss_{name}": v for name, v in losses.items()}
            self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=images)
            for name, value in parts.items():
                self.log(f"train_{name}", value, on_step=False, on_epoch=True, batch_size=images)
        self.log("lr", self.current_lr(), prog_bar=True)
        return loss

    def log_scores(self, scores: dict[str, float | None]) -> None:
        """Log what a validation found; None is a number that there is nothing for."""
        for name, value in scores.items():
            if value is not None:
                self.log(f"val_{name}", value, prog_bar=f"val_{name}" == self.score)

    def check_validated(self, images: int) -> None:
        """Stop where none of the validation images could be used."""
        self.log_bad_images()
        if not images:
            reason = next(iter(self.bad_images.reasons.values()), "there is none")
            raise LightspineError(f"none of the validation images can be used; {reason}")

    def data_module(self, kind: type[ImageDataModule]) -> Any:
        """Return the data of the run, which must be of a kind.

        Raises:
            UsageError: it is of another one.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, kind):
            raise UsageError(
                f"expected a {kind.__name__} to train {self.model_name}, got {type(data).__name__}"
            )
        return data
