"""What was left out of an annotation file, or mended: counted by its kind, with an example of each."""

from collections import Counter


class AnnotationProblems:
    """Counts the flaws of an annotation file.

    Attributes:
        counts: how often each kind of flaw was met.
        examples: the first place where each kind was met.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, where: str) -> None:
        """Count a flaw; `where` names the place to a user."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, where)

    def sentences(self) -> list[str]:
        """Return one line per kind, the most frequent first."""
        return [f"{count} x {kind}, first {self.examples[kind]}" for kind, count in self.counts.most_common()]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return "; ".join(self.sentences())
