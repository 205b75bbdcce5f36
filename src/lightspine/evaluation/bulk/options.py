"""How a run over many images is done."""

from dataclasses import dataclass
from pathlib import Path

from lightspine.errors import UsageError
from lightspine.evaluation.networks import Weights


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How a run over many images is done.

    Attributes:
        checkpoint: the file of weights, where the model is given by its name.
        weights: "model" (as trained), "ema" (their average), or "auto" for those whose score is published.
        image_size: height and width in pixels; the checkpoint's own without it.
        crop_pct: see `lightspine.evaluation.networks.find_preprocessing`.
        crop_mode: likewise.
        batch_size: images per forward pass.
        part_size: images per part; a killed run loses at most one part per process. The rows of one part are
            in memory at a time.
        num_workers: processes that read images, per device; 0 reads in the process that computes.
        device: torch's name of the device; "cuda" gives every process a GPU of its own.
        devices: how many processes share the work. More than one are started with Python's "spawn", so a
            script that calls this needs `if __name__ == "__main__"`. Under torchrun its processes do it.
        resume: go on with what an earlier run in the folder has done; a finished one stays as it is.
        progress: show a bar on the standard error.

    Raises:
        UsageError: a number out of its range.
    """

    checkpoint: str | Path | None = None
    weights: Weights = "auto"
    image_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    batch_size: int = 64
    part_size: int = 1024
    num_workers: int = 0
    device: str = "cpu"
    devices: int = 1
    resume: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("part_size", self.part_size, 1),
            ("num_workers", self.num_workers, 0),
            ("devices", self.devices, 1),
        ):
            if value < least:
                raise UsageError(f"expected {name} of at least {least}, got {value}")
        if self.devices > 1 and ":" in self.device:
            raise UsageError(f"expected a kind of device, such as cuda, for several, got {self.device}")
