"""Text from files with control characters escaped."""

import json

import pytest

from lightspine.utils.printable import printable, printable_json


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2Jcat", "\\x1b[2Jcat"),
        ("cat\rdog", "cat\\rdog"),
        ("cat\ndog", "cat\\ndog"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_become_escapes(text: str, expected: str) -> None:
    assert printable(text) == expected


@pytest.mark.parametrize("text", ["Größe 12 µm", "山 田", "می\u200cروم", "👩\u200d🌾", "C:\\new", "a\udcff"])
def test_other_text_is_unchanged(text: str) -> None:
    assert printable(text) == text


def test_newlines_are_kept_if_asked() -> None:
    assert printable("a\n\x1bb\r\n", keep_newlines=True) == "a\n\\x1bb\\r\n"


def test_json_keeps_its_values() -> None:
    value = {"\x1b[2J": ["\u202e", "\x9b\x7f", "a\nb", "\U000e0041", "\udcff", "\ud800"]}
    text = printable_json(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(text) == value
    assert printable(text, keep_newlines=True) == text
