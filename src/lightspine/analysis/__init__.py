"""Looking into a network: receptive fields, class activation, attention, contexts, redundant heads.

Only what draws a figure loads matplotlib.

    >>> import numpy as np
    >>> from PIL import Image
    >>> from lightspine.analysis import cam, open_subject
    >>> subject = open_subject("shvit_s1", size=64)
    >>> (result,) = cam(subject, [Image.fromarray(np.zeros((80, 97, 3), np.uint8))])
    >>> result.picture.note
    '97x80 px seen as 64x64'
"""

from lightspine.analysis.attention_maps import attention
from lightspine.analysis.attention_results import AttentionResult, ClassPathResult
from lightspine.analysis.class_activation import CamResult, cam
from lightspine.analysis.context_maps import ContextResult, context
from lightspine.analysis.head_redundancy import RedundancyResult, redundancy
from lightspine.analysis.pictures import Picture, list_files, read_picture
from lightspine.analysis.receptive_field import ErfResult, ReceptiveField, erf
from lightspine.analysis.results import ImageResult, Panel, draw_results
from lightspine.analysis.saving import save_arrays, save_figure
from lightspine.analysis.state_importance import ImportanceResult, importance
from lightspine.analysis.subject import Subject, open_subject

__all__ = [
    "AttentionResult",
    "CamResult",
    "ClassPathResult",
    "ContextResult",
    "ErfResult",
    "ImageResult",
    "ImportanceResult",
    "Panel",
    "Picture",
    "ReceptiveField",
    "RedundancyResult",
    "Subject",
    "attention",
    "cam",
    "context",
    "draw_results",
    "erf",
    "importance",
    "list_files",
    "open_subject",
    "read_picture",
    "redundancy",
    "save_arrays",
    "save_figure",
]
