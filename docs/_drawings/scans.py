"""Drawings of the scans: the recurrence, the four directions of VMamba, the two of Vim."""

from svg import Drawing


def recurrence() -> Drawing:
    """The state passes from position to position."""
    drawing = Drawing("The recurrence of a selective scan, unrolled over four positions", 720, 300)
    for step in range(4):
        x = 70 + 165 * step
        drawing.box(x, 210, 70, 34, f"u{step + 1}", "plain")
        drawing.box(x, 120, 70, 34, f"h{step + 1}", "scan")
        drawing.box(x, 30, 70, 34, f"y{step + 1}", "mix")
        drawing.arrow((x + 35, 210), (x + 35, 154))
        drawing.arrow((x + 35, 120), (x + 35, 64))
        drawing.text(x + 42, 188, f"dt{step + 1} B{step + 1}", size=12, anchor="start", pale=True)
        drawing.text(x + 42, 98, f"C{step + 1}", size=12, anchor="start", pale=True)
        drawing.arrow((x - 95 if step else x - 50, 137), (x, 137))
        drawing.text(
            x - 47 if step else x - 26, 128, f"exp(dt{step + 1} A)" if step else "h0 = 0", size=11, pale=True
        )
    drawing.text(
        360,
        280,
        "dt, B and C are computed from the input itself: that is what makes the scan selective",
        pale=True,
    )
    return drawing


def directions() -> Drawing:
    """The orders in which SS2D reads a map."""
    drawing = Drawing("The four directions in which VMamba scans a map of 3 x 4 pixels", 800, 250)
    height, width, side = 3, 4, 40
    rows = [(r, c) for r in range(height) for c in range(width)]
    columns = [(r, c) for c in range(width) for r in range(height)]
    for number, (name, order) in enumerate(
        [("rows", rows), ("columns", columns), ("rows back", rows[::-1]), ("columns back", columns[::-1])]
    ):
        left, top = 20 + 195 * number, 45
        drawing.text(left + width * side / 2, 30, f"{number}: {name}", size=14)
        for position, (row, column) in enumerate(order):
            shade = 255 - round(12 * position)
            drawing.cell(
                left + column * side,
                top + row * side,
                side,
                f"rgb(255,{shade},{max(shade - 60, 40)})",
                str(position + 1),
            )
    drawing.text(
        400,
        200,
        "Each direction has its own steps, state matrix and projections; a number says when a pixel is read.",
        pale=True,
    )
    drawing.text(400, 222, "The four outputs of a pixel are added up.", pale=True)
    return drawing


def middle_token() -> Drawing:
    """The sequence of Vim: patches, the class token in their middle, read in both directions."""
    drawing = Drawing("Vim reads its tokens forwards and backwards, the class token in the middle", 760, 230)
    side, left = 44, 82
    for position in range(13):
        middle = position == 6
        words = "cls" if middle else str(position + 1 if position < 6 else position)
        drawing.cell(left + position * (side + 2), 90, side, "#fecaca" if middle else "#dbeafe", words)
    drawing.arrow((left, 72), (left + 13 * 46, 72), color="#b45309")
    drawing.text(left + 299, 60, "forward: own convolution, projections, A and D", pale=True)
    drawing.arrow((left + 13 * 46, 154), (left, 154), color="#1d4ed8")
    drawing.text(
        left + 299,
        175,
        "backward: the same layers with weights of their own, on the reversed sequence",
        pale=True,
    )
    drawing.text(
        left + 299, 205, "From the middle, the class token has half of the image on each side.", pale=True
    )
    return drawing
