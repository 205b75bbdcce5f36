"""The tables of the papers as lists of models to measure, and what the authors print about them."""

from lightspine.benchmark.presets.catalogue import Preset as Preset
from lightspine.benchmark.presets.catalogue import find_preset as find_preset
from lightspine.benchmark.presets.catalogue import list_presets as list_presets
from lightspine.benchmark.presets.published import find_published as find_published

__all__ = ["Preset", "find_preset", "find_published", "list_presets"]
