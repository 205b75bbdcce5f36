"""What an exported file says about itself."""

import json
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from lightspine._version import __version__

PREFIX = "lightspine."


@dataclass(kw_only=True)
class Description:
    """What goes into a file beside the network.

    Attributes:
        name: of the model.
        kind: see `lightspine.export.targets.Target`.
        class_names: one per class, or `None`.
        preprocessing: `input_size` (channels, height, width), `interpolation`, `mean`, `std`, `crop_pct`,
            `crop_mode`.
        pixels: whether the network takes 8-bit pixels (B, H, W, C) and normalises them itself.
        strides: of the maps, where the outputs are maps.
        precision: of the weights and sums.
        source: what the weights were read from.
    """

    name: str
    kind: str
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    pixels: bool = False
    strides: tuple[int, ...] = ()
    precision: str = "fp32"
    source: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the entries as one JSON object."""
        return json.dumps(self.entries())

    def entries(self) -> dict[str, str]:
        """Return the entries of the file, text by name; what is no plain text is JSON."""
        found: dict[str, str] = {
            "model": self.name,
            "kind": self.kind,
            "class_names": json.dumps(self.class_names),
            "preprocessing": json.dumps(self.preprocessing),
            "pixels": json.dumps(self.pixels),
            "strides": json.dumps(self.strides),
            "precision": self.precision,
            "source": json.dumps(self.source),
            "version": __version__,
        }
        if (commit := source_commit()) is not None:
            found["commit"] = commit
        return {PREFIX + key: value for key, value in found.items()}


def source_commit() -> str | None:
    """Return the commit that this library was installed from or lies in, or `None` for a released wheel."""
    try:
        record = distribution("lightspine").read_text("direct_url.json")
    except PackageNotFoundError:
        record = None
    installed = json.loads(record).get("vcs_info", {}).get("commit_id") if record else None
    return installed or _checked_out(Path(__file__).parents[3] / ".git")


def _checked_out(git: Path) -> str | None:
    if not (git / "HEAD").is_file():
        return None
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    reference = head.removeprefix("ref: ")
    if (git / reference).is_file():
        return (git / reference).read_text().strip()
    packed = git / "packed-refs"
    found = (
        re.search(rf"^(\w+) {re.escape(reference)}$", packed.read_text(), re.M) if packed.is_file() else None
    )
    return found[1] if found else None
