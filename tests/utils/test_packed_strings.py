"""PackedStrings behaves like a list of strings."""

import pytest

from lightspine.utils.packed_strings import PackedStrings

TEXTS = [
    "a/b.jpg",
    "",
    "zażółć gęślą",
    "\udcc3\udca9 utf-8 under an ascii locale",
    "\udcff odd bytes of a file name",
    "",
    "x" * 1000,
    "日本",
]


def test_packed_texts_come_back() -> None:
    assert list(PackedStrings.pack(TEXTS)) == TEXTS


@pytest.mark.parametrize("index", [0, 3, 4, -1, -8])
def test_packed_text_is_found_by_index(index: int) -> None:
    assert PackedStrings.pack(TEXTS)[index] == TEXTS[index]


def test_slice_of_packed_texts_is_a_list() -> None:
    assert PackedStrings.pack(TEXTS)[1:6:2] == TEXTS[1:6:2]


@pytest.mark.parametrize("index", [8, -9])
def test_index_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(IndexError):
        PackedStrings.pack(TEXTS)[index]


def test_no_texts_can_be_packed() -> None:
    assert list(PackedStrings.pack([])) == []
