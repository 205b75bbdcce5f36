"""A few shapes as SVG: enough for boxes, arrows and words, with nothing that a browser has to load."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

INK, PALE = "#1f2937", "#6b7280"
FILLS = {
    "plain": "#f3f4f6",
    "conv": "#dbeafe",
    "scan": "#fde68a",
    "attention": "#fbcfe8",
    "mix": "#d1fae5",
    "token": "#fecaca",
}


@dataclass
class Drawing:
    """An SVG picture, in pixels.

    Attributes:
        title: what the picture shows, for who cannot see it.
        width: of the picture.
        height: of the picture.
    """

    title: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, label: str, kind: str = "plain") -> None:
        """Draw a rectangle with a label of one or several lines."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{FILLS[kind]}" '
            f'stroke="{INK}" stroke-width="1.2"/>'
        )
        lines = label.split("\n")
        first = y + height / 2 - 7.5 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            self.text(x + width / 2, first + 15 * number, line)

    def text(
        self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "middle", pale: bool = False
    ) -> None:
        """Write one line, its baseline at y."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{PALE if pale else INK}">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False, color: str = INK) -> None:
        """Draw a line through points with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dash} '
            'marker-end="url(#head)"/>'
        )

    def plus(self, x: float, y: float, sign: str = "+") -> None:
        """Draw a circle with a sign: where two streams meet."""
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="#fff" stroke="{INK}" stroke-width="1.2"/>'
        )
        self.text(x, y + 5, sign, size=15)

    def cell(self, x: float, y: float, side: float, fill: str = "#f3f4f6", words: str = "") -> None:
        """Draw a square, such as a pixel."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="{fill}" stroke="{PALE}"/>'
        )
        if words:
            self.text(x + side / 2, y + side / 2 + 4, words, size=11)

    def render(self) -> str:
        """Return the picture as text."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img" '
                'font-family="system-ui, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
                'markerHeight="7" orient="auto-start-reverse">'
                '<path d="M0 0 10 5 0 10z" fill="context-stroke"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>',
                *self.parts,
                "</svg>",
                "",
            ]
        )


def chain(
    drawing: Drawing, x: float, y: float, steps: list[tuple[str, str]], *, width: float = 150, gap: float = 22
) -> list[tuple[float, float]]:
    """Draw boxes in a column, joined by arrows; return the middles of their tops and of the last bottom."""
    tops = []
    for number, (label, kind) in enumerate(steps):
        height = 18 + 15 * (label.count("\n") + 1)
        if number:
            drawing.arrow((x + width / 2, y - gap), (x + width / 2, y))
        drawing.box(x, y, width, height, label, kind)
        tops.append((x + width / 2, y))
        y += height + gap
    return [*tops, (x + width / 2, y - gap)]


def save(drawing: Drawing, path: Path) -> None:
    """Write the picture."""
    path.write_text(drawing.render(), encoding="utf-8")
