"""Attention for one query, and the path of the class token: what is found and how it is drawn."""

from dataclasses import dataclass

import numpy as np

from lightspine.analysis.results import ImageResult, Panel, picture_panel


@dataclass(frozen=True)
class AttentionResult(ImageResult):
    """The attention of one layer for one query.

    Attributes:
        module: name of the layer.
        kind: "scan" or "softmax".
        query: (y, x) in pixels of the image as the network sees it.
        cell: (row, column) of the query in the layer's map.
        labels: directions of a scan or heads, the merged map last.
        reads: (K + 1, h, w); share of every position in what the query reads, 1 in all per map. Of a scan it
            is that of the mean over channels of the absolute weights through the state, the skip D left out.
        readers: (K + 1, h, w) likewise: how much every position reads the query; `None` of softmax.
    """

    module: str
    kind: str
    query: tuple[int, int]
    cell: tuple[int, int]
    labels: list[str]
    reads: np.ndarray
    readers: np.ndarray | None

    def image_panel(self) -> Panel:
        """Return the image with a cross at the query."""
        return picture_panel(self.picture, self._mark())

    def rows(self) -> list[list[Panel]]:
        """Return what the query reads and, of a scan, what reads it."""
        found = [self._row("", self.reads)]
        if self.readers is not None:
            found.append(self._row("read by: ", self.readers))
        return found

    def _row(self, prefix: str, maps: np.ndarray) -> list[Panel]:
        return [
            Panel(f"{prefix}{label}", values, mark=self._mark(), size=self.picture.size, root=True)
            for label, values in zip(self.labels, maps, strict=True)
        ]

    def _mark(self) -> tuple[float, float]:
        height, width = self.picture.size
        _, rows, columns = self.reads.shape
        return (self.cell[0] + 0.5) * height / rows, (self.cell[1] + 0.5) * width / columns

    def arrays(self) -> dict[str, np.ndarray]:
        """Return reads, readers, labels, query and cell."""
        found = super().arrays() | {
            "reads": self.reads,
            "labels": np.asarray(self.labels),
            "query": np.asarray(self.query),
            "cell": np.asarray(self.cell),
        }
        return found if self.readers is None else found | {"readers": self.readers}

    def heading(self) -> str:
        """Return network, layer and query."""
        what = "implicit attention" if self.kind == "scan" else "attention"
        return f"{self.subject}, {self.picture.name}: {what} of {self.module}"

    def caption(self) -> str:
        """Return how the maps are scaled."""
        means = "what the pixel at the cross reads"
        if self.kind == "scan":
            means += " through the state, below: what reads it; mean absolute weight over channels"
        return f"{means}; every map on its own scale, brightness by the square root"


@dataclass(frozen=True)
class ClassPathResult(ImageResult):
    """Where the class token reads from, layer by layer.

    Attributes:
        modules: names of the layers.
        reads: (layers, h, w); share of every patch in what the class token reads, of scans as in
            `AttentionResult` and merged over directions, of softmax attention averaged over heads.
        kept: (layers,); share that it reads from class tokens, itself above all. With `reads` it sums to 1.
    """

    modules: list[str]
    reads: np.ndarray
    kept: np.ndarray

    def rows(self) -> list[list[Panel]]:
        """Return one map per layer."""
        titles = [
            f"{module}: {100 * kept:.0f} % own" for module, kept in zip(self.modules, self.kept, strict=True)
        ]
        return [
            [Panel(t, m, size=self.picture.size, root=True) for t, m in zip(titles, self.reads, strict=True)]
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return reads, kept and the names of the layers."""
        return super().arrays() | {
            "reads": self.reads,
            "kept": self.kept,
            "modules": np.asarray(self.modules),
        }

    def heading(self) -> str:
        """Return network and image."""
        return f"{self.subject}, {self.picture.name}: where the class token reads from"

    def caption(self) -> str:
        """Return how the maps are scaled."""
        own = "own: share that it reads from class tokens, itself above all"
        return f"{own}; every map on its own scale, brightness by the square root"
