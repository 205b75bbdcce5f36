"""ImageNet class names: WordNet ids (synsets) such as n01440764 and their descriptions."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

_SYNSET = re.compile(r"n\d{8}$")


def is_synset(name: str) -> bool:
    """Return whether a name has the form of a WordNet id: "n" and eight digits."""
    return _SYNSET.match(name) is not None


def synset_description(name: str) -> str | None:
    """Return the description of a WordNet id, or `None` if it is in neither ImageNet-1k nor ImageNet-22k.

    Descriptions are unique: where several ids share one (two classes of ImageNet-1k are called "crane"), the
    id is appended.
    """
    return _descriptions().get(name) if is_synset(name) else None


def synset_descriptions(names: Sequence[str]) -> list[str]:
    """Return the description of every WordNet id; other names are returned unchanged."""
    return [synset_description(name) or name for name in names]


def imagenet_synsets() -> list[str]:
    """Return the WordNet ids of the 1000 classes of ImageNet-1k in the order of their indices."""
    return ImageNetInfo("imagenet-1k").label_names()


@cache
def _descriptions() -> dict[str, str]:
    all_classes, thousand = (
        {name: info.label_name_to_description(name) for name in info.label_names()}
        for info in (ImageNetInfo("imagenet-22k"), ImageNetInfo("imagenet-1k"))
    )
    return _make_unique(all_classes | thousand) | _make_unique(thousand)


def _make_unique(descriptions: dict[str, str]) -> dict[str, str]:
    count = Counter(descriptions.values())
    return {name: text if count[text] == 1 else f"{text} ({name})" for name, text in descriptions.items()}
