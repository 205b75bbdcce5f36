"""ImageNet's classes: a WordNet id such as n01440764 and what it means to a reader."""

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
    """Return what a WordNet id of ImageNet means, the same text that `synset_descriptions` gives.

    None for a name that is no id of ImageNet-1k or ImageNet-22k. Two classes of ImageNet-1k are called
    "crane": those come with their id, and so does what else shares its words.
    """
    return _descriptions().get(name) if is_synset(name) else None


def synset_descriptions(names: Sequence[str]) -> list[str]:
    """Return the meaning of every WordNet id, and any other name as it is."""
    return [synset_description(name) or name for name in names]


def imagenet_synsets() -> list[str]:
    """Return the WordNet ids of the 1000 classes of ImageNet-1k in the order of their numbers."""
    return ImageNetInfo("imagenet-1k").label_names()


@cache
def _descriptions() -> dict[str, str]:
    all_classes, thousand = (
        {name: info.label_name_to_description(name) for name in info.label_names()}
        for info in (ImageNetInfo("imagenet-22k"), ImageNetInfo("imagenet-1k"))
    )
    return _tell_apart(all_classes | thousand) | _tell_apart(thousand)


def _tell_apart(descriptions: dict[str, str]) -> dict[str, str]:
    shared = Counter(descriptions.values())
    return {name: text if shared[text] == 1 else f"{text} ({name})" for name, text in descriptions.items()}
