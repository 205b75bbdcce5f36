"""The efficient vision backbones VMamba, Vim, EfficientViM, SHViT and EfficientMod in one library."""

from lightspine._version import __version__ as __version__
from lightspine.models import list_models as list_models
from lightspine.models._factory import create_model as create_model
from lightspine.ops.selective_scan import selective_scan as selective_scan

__all__ = ["__version__", "create_model", "list_models", "selective_scan"]
