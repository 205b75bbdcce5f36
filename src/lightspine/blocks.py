"""The building blocks of the five families by themselves, for networks of your own.

Each takes and gives a map `(B, C, H, W)` of any size; the published models are made of these same classes.
"""

from lightspine.models._efficientmod_blocks import EfficientModAttentionBlock as EfficientModAttentionBlock
from lightspine.models._efficientmod_blocks import EfficientModBlock as EfficientModBlock
from lightspine.models._efficientvim_blocks import HSMSSD as HSMSSD
from lightspine.models._efficientvim_blocks import NCSSD as NCSSD
from lightspine.models._efficientvim_blocks import EfficientViMBlock as EfficientViMBlock
from lightspine.models._shvit_blocks import SHSA as SHSA
from lightspine.models._shvit_blocks import SHViTBlock as SHViTBlock
from lightspine.models._vim_blocks import VimBlock as VimBlock
from lightspine.models._vim_blocks import VimMixer as VimMixer
from lightspine.models._vmamba_blocks import SS2D as SS2D
from lightspine.models._vmamba_blocks import VSSBlock as VSSBlock

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
