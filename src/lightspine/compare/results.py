"""Results of a comparison, saved as `results.json`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightspine.utils.files import atomic_write_text

Status = Literal["waiting", "done", "failed", "interrupted"]


@dataclass(kw_only=True)
class ModelResult:
    """Results of one model; values that are not yet known are `None`.

    Attributes:
        name: model name.
        status: "waiting", "done", "failed" or "interrupted".
        error: the reason of a failure.
        params: number of parameters, with the classifier for this data.
        macs: multiply-adds of one image at `input_size` (`lightspine.benchmark.count_macs`).
        input_size: (channels, height, width) of the model's input.
        accuracy: top-1 accuracy of the saved file on the held-out images, in percent.
        train_seconds: duration of the training, including validation.
        latency_ms: median latency of one image.
        latency_p90_ms: 90th percentile of the latency.
        checkpoint: the saved model, relative to the comparison's folder.
        skipped: path and reason of each image that could not be read.
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
    """Results of a comparison: one row per model, with the settings and the system.

    Attributes:
        folder: folder of all files.
        data: name of the data.
        system: versions, processor, threads (`lightspine.benchmark.describe_system`).
        settings: the training settings.
        models: one row per model.
        files: files other than the checkpoints, relative to `folder`.
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
        """The models that were trained and evaluated."""
        return [row for row in self.models if row.status == "done"]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the comparison early."""
        return any(row.status == "interrupted" for row in self.models)

    @property
    def conditions(self) -> str:
        """Conditions of the latency, for captions."""
        threads = self.system["torch_threads"]
        return f"{self.system['processor']}, {threads} thread{'s' if threads > 1 else ''}, batch 1"

    @property
    def exit_status(self) -> int:
        """0 if every model was trained, 1 if one failed, 130 after Ctrl-C."""
        if self.interrupted:
            return 130
        return 0 if len(self.finished) == len(self.models) else 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"folder": str(self.folder)}

    def save(self) -> Path:
        """Write `results.json` atomically and return its path.

        Raises:
            LightspineError: the file cannot be written.
        """
        path = self.folder / "results.json"
        atomic_write_text(path, json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")
        return path
