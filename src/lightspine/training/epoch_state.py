"""What a run needs to go on in the middle of an epoch: its position in the data and its running means."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from lightspine.data.loader import ResumableLoader


class EpochState(pl.Callback):
    """Saves the position in the training data and what `self.log(..., on_epoch=True)` has summed up so far.

    Lightning keeps the sums out of its checkpoints: the training loss of a resumed epoch would be the mean of
    its later part only. The position it saves, but forgets to restore where a task has asked for
    `trainer.estimated_stepping_batches`, which most do.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._restored: dict[str, tuple[float, float]] = {}
        self._position: dict[str, int] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Note whose sums are saved."""
        self._trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Move the loader to the restored position; it has not given a batch yet."""
        position, self._position = self._position, None
        if position is not None and isinstance(trainer.train_dataloader, ResumableLoader):
            trainer.train_dataloader.load_state_dict(position)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Add the restored sums to those that the first batch has begun."""
        restored, self._restored = self._restored, {}
        for name, metric in _means(trainer).items():
            if name in restored:
                value, weight = restored[name]
                metric.value += value
                metric.cumulated_batch_size += weight

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which all processes have in common, and the sums of every process."""
        assert self._trainer is not None
        # At the end of an epoch they have served.
        done = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        sums = {
            name: (metric.value.item(), metric.cumulated_batch_size.item())
            for name, metric in (() if done else _means(self._trainer).items())
        }
        everyone = [sums]
        if dist.is_available() and dist.is_initialized():
            everyone = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, sums)
        loader = self._trainer.train_dataloader
        position = loader.state_dict() if isinstance(loader, ResumableLoader) else None
        return {"position": position, "sums": everyone}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position, and the sums of this process."""
        assert self._trainer is not None
        self._position = state_dict["position"]
        everyone = state_dict["sums"]
        # With fewer processes than before some sums would be lost, so one process takes them all.
        if len(everyone) == self._trainer.world_size:
            self._restored = everyone[self._trainer.global_rank]
        elif self._trainer.is_global_zero:
            self._restored = _total(everyone)


def _means(trainer: pl.Trainer) -> dict[str, Any]:
    # Lightning 2.6 has no public way to them.
    results = trainer.fit_loop.epoch_loop._results
    return {
        name: metric
        for name, metric in results.items()
        if metric.meta.on_epoch and metric.is_tensor and metric.meta.is_mean_reduction
    }


def _total(everyone: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    names = {name for sums in everyone for name in sums}
    return {
        name: (
            sum(sums[name][0] for sums in everyone if name in sums),
            sum(sums[name][1] for sums in everyone if name in sums),
        )
        for name in names
    }
