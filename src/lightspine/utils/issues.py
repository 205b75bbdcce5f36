"""Counts of what was skipped or repaired in data."""

from collections import Counter


class Issues:
    """Problems in data that were skipped or repaired.

    Attributes:
        counts: number of occurrences of each kind of problem.
        examples: first occurrence of each kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Count a problem; `where` names the file, image or annotation."""
        self.counts[kind] += count
        self.examples.setdefault(kind, where)

    def sentences(self) -> list[str]:
        """Return one line per kind, the most frequent first."""
        return [f"{count} x {kind}, first {self.examples[kind]}" for kind, count in self.counts.most_common()]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return "; ".join(self.sentences())
