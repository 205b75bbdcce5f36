"""Escapes for text from files: class names, file names and metadata may hold control characters."""

import re

# Control characters, which a terminal executes (escape sequences, carriage return), line and paragraph
# separators, and invisible characters that change the direction or the length of a line. The joiners U+200C
# and U+200D are kept: Persian words and emoji need them. The surrogates that stand for bytes of file names
# (not UTF-8) are kept; others cannot be printed.
_CLASS = (
    "\x00-{}\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udc7f\udd00-\udfff"
    "\U000e0000-\U000e007f"
)
_UNPRINTABLE = re.compile(f"[{_CLASS.format(chr(0x0A))}]")
_UNPRINTABLE_IN_LINES = re.compile(f"[{_CLASS.format(chr(0x09))}]")


def printable(text: str, *, keep_newlines: bool = False) -> str:
    r"""Return a text with its control characters as Python's escapes, such as `\x1b`, `\r` and `\u202e`.

    Without this, a class name in a checkpoint could clear the terminal or overwrite other lines.

    Args:
        text: any text. A text without such characters is returned unchanged; backslashes are not doubled.
        keep_newlines: keep line feeds, for text of several lines.
    """
    pattern = _UNPRINTABLE_IN_LINES if keep_newlines else _UNPRINTABLE
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def figure_text(text: str) -> str:
    r"""Return a text for a matplotlib figure: escaped as by `printable`, and not taken for a formula.

    matplotlib sets what is between two dollar signs as mathematics and fails if it is none, such as
    `$\frac{$`; it also fails on the surrogates of file names that are not UTF-8.

    Args:
        text: a class or file name, or a text with one.
    """
    visible = printable(text, keep_newlines=True).encode("utf-8", "backslashreplace").decode("utf-8")
    return visible.replace("$", r"\$")


def printable_json(text: str) -> str:
    r"""Return JSON with the control characters in its strings as JSON's escapes, such as `\u202e`.

    Args:
        text: the output of `json.dumps` with `ensure_ascii=False`, also with indentation.
    """
    return _UNPRINTABLE_IN_LINES.sub(lambda match: _json_escape(match[0]), text)


def _json_escape(character: str) -> str:
    # JSON writes characters beyond U+FFFF as two surrogates.
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
