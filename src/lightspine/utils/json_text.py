"""Parsing of JSON from files of other people."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document, as `json.loads` does.

    Raises:
        ValueError: the text is not JSON, not UTF-8, or nested more deeply than Python's stack allows.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
