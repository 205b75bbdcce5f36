"""What a comparison found, and how it is written down."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightspine.utils.files import atomic_write_text

Status = Literal["waiting", "done", "failed", "interrupted"]


@dataclass(kw_only=True)
class ModelResult:
    """One model's row; a value that was not reached is `None`.

    Attributes:
        name: model name.
        status: "waiting" until it is trained, then "done", "failed" (see `error`) or "interrupted".
        error: the sentence of the failure.
        params: number of parameters, with the classifier of this data.
        macs: multiply-adds of one image at `input_size` (`lightspine.benchmark.count_macs`).
        input_size: (channels, height, width) of the images that the model saw.
        accuracy: top-1 accuracy in percent on the held-out images, of the saved file.
        train_seconds: time of the training, with its validations.
        latency_ms: median time of one image.
        latency_p90_ms: nine of ten passes were faster.
        checkpoint: the saved model, relative to the comparison's folder.
        skipped: path -> reason of the images that could not be used.
    """

    name: str
    status: Status = "waiting"
    error: str = ""
    params: int | None = None
    macs: int | None = None
    input_size: tuple[int, int, int] | None = None
    accuracy: float | None = None
    train_seconds: float | None = None
    latency_ms: float | None = None
    latency_p90_ms: float | None = None
    checkpoint: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class CompareResult:
    """The rows of all models, in the order in which they were asked for, and how they came about.

    Attributes:
        folder: holds everything that was written.
        data: the data's name or folder.
        system: versions, processor, threads (`lightspine.benchmark.describe_system`).
        settings: the training settings.
        models: one row per model.
        files: what was written besides the checkpoints, relative to `folder`.
        seconds: duration of the whole comparison.
    """

    folder: Path
    data: str
    system: dict[str, Any]
    settings: dict[str, Any]
    models: list[ModelResult]
    files: list[str] = field(default_factory=lambda: ["results.json"])
    seconds: float = 0.0

    @property
    def finished(self) -> list[ModelResult]:
        """The rows of the models that were trained and scored."""
        return [row for row in self.models if row.status == "done"]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the comparison early."""
        return any(row.status == "interrupted" for row in self.models)

    @property
    def conditions(self) -> str:
        """How the latency was measured, for captions."""
        threads = self.system["torch_threads"]
        return f"{self.system['processor']}, {threads} thread{'s' if threads > 1 else ''}, batch 1"

    @property
    def exit_status(self) -> int:
        """0 when every model was trained, 1 when one failed, 130 after Ctrl-C."""
        if self.interrupted:
            return 130
        return 0 if len(self.finished) == len(self.models) else 1

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self) | {"folder": str(self.folder)}

    def save(self) -> Path:
        """Write `results.json` atomically and return its path."""
        path = self.folder / "results.json"
        atomic_write_text(path, json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")
        return path
