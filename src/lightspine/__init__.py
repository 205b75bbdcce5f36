"""Efficient vision backbones: VMamba, Vim, EfficientViM, SHViT and EfficientMod."""

from lightspine import blocks as blocks
from lightspine import ops as ops
from lightspine._version import __version__ as __version__
from lightspine.models import list_models as list_models
from lightspine.models.factory import convert_checkpoint as convert_checkpoint
from lightspine.models.factory import create_model as create_model
from lightspine.models.factory import load_model as load_model
from lightspine.models.loading import load_checkpoint as load_checkpoint
from lightspine.models.saving import save_checkpoint as save_checkpoint
from lightspine.ops import selective_scan as selective_scan
from lightspine.optimize import optimize as optimize
from lightspine.utils.allocation import keep_freed_memory as keep_freed_memory

__all__ = [
    "__version__",
    "blocks",
    "convert_checkpoint",
    "create_model",
    "keep_freed_memory",
    "list_models",
    "load_checkpoint",
    "load_model",
    "ops",
    "optimize",
    "save_checkpoint",
    "selective_scan",
]
