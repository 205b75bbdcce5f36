"""Building blocks of the model families, for use in other networks.

Each takes and returns a map `(B, C, H, W)` of any size. The models of this library use the same classes.
"""

from lightspine.models.efficientmod import EfficientModAttentionBlock as EfficientModAttentionBlock
from lightspine.models.efficientmod import EfficientModBlock as EfficientModBlock
from lightspine.models.efficientvim import HSMSSD as HSMSSD
from lightspine.models.efficientvim import NCSSD as NCSSD
from lightspine.models.efficientvim import EfficientViMBlock as EfficientViMBlock
from lightspine.models.shvit import SHSA as SHSA
from lightspine.models.shvit import SHViTBlock as SHViTBlock
from lightspine.models.vim import VimBlock as VimBlock
from lightspine.models.vim import VimMixer as VimMixer
from lightspine.models.vmamba import SS2D as SS2D
from lightspine.models.vmamba import VSSBlock as VSSBlock

__all__ = [
    "HSMSSD",
    "NCSSD",
    "SHSA",
    "SS2D",
    "EfficientModAttentionBlock",
    "EfficientModBlock",
    "EfficientViMBlock",
    "SHViTBlock",
    "VSSBlock",
    "VimBlock",
    "VimMixer",
]
