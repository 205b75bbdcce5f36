"""Analysis of vision models: receptive fields, Grad-CAM, attention maps, context maps, head redundancy.

matplotlib is imported only when a figure is drawn.

    >>> import numpy as np
    >>> from PIL import Image
    >>> from lightspine.analysis import cam, open_model
    >>> model = open_model("shvit_s1", size=64)
    >>> (result,) = cam(model, [Image.fromarray(np.zeros((80, 97, 3), np.uint8))])
    >>> result.image.note
    '97x80 px seen as 64x64'
"""

import warnings
from typing import Any

from lightspine.analysis.attention_maps import AttentionResult, ClassPathResult, attention
from lightspine.analysis.class_activation import CamResult, cam
from lightspine.analysis.figure_grid import Panel
from lightspine.analysis.head_redundancy import RedundancyResult, redundancy
from lightspine.analysis.image_input import ImageInput, read_image
from lightspine.analysis.mixer_maps import ContextResult, ImportanceResult, context, importance
from lightspine.analysis.model_handle import ModelHandle, open_model
from lightspine.analysis.receptive_field import ErfResult, ReceptiveField, erf
from lightspine.analysis.results import ImageResult, draw_results, save_arrays, save_figure
from lightspine.utils.image_files import expand_image_paths

__all__ = [
    "AttentionResult",
    "CamResult",
    "ClassPathResult",
    "ContextResult",
    "ErfResult",
    "ImageInput",
    "ImageResult",
    "ImportanceResult",
    "ModelHandle",
    "Panel",
    "ReceptiveField",
    "RedundancyResult",
    "attention",
    "cam",
    "context",
    "draw_results",
    "erf",
    "expand_image_paths",
    "importance",
    "open_model",
    "read_image",
    "redundancy",
    "save_arrays",
    "save_figure",
]


def __getattr__(name: str) -> Any:
    if name == "open_subject":
        warnings.warn(
            "lightspine.analysis.open_subject is deprecated, use open_model", FutureWarning, stacklevel=2
        )
        return open_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
