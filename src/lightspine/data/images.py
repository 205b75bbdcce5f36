"""Open an image as 8-bit RGB, whatever it holds; the same function that exported models are run with."""

from lightspine_runtime.images import MIN_SIDE as MIN_SIDE
from lightspine_runtime.images import decode_image as decode_image
from lightspine_runtime.images import open_image as open_image

__all__ = ["MIN_SIDE", "decode_image", "open_image"]
