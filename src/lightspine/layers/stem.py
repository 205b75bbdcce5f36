"""The stride of a stem, which every family can be given for images smaller than the published ones."""

from lightspine.errors import UsageError


def stem_strides(stem_stride: int, convolutions: int) -> tuple[int, ...]:
    """Return the stride of each convolution of a stem, all of which are 2 as published.

    A stem of a smaller stride has the same weights: the first convolutions step by 1, the others by 2. The
    image is so looked at in full before it shrinks; the first ones are the narrowest and can afford it.

    Args:
        stem_stride: product of the strides.
        convolutions: number of convolutions.

    Raises:
        UsageError: `stem_stride` is no power of two, or more than the convolutions can give.
    """
    choices = [2**count for count in range(convolutions + 1)]
    check_stem_stride(stem_stride, choices)
    halvings = choices.index(stem_stride)
    return (1,) * (convolutions - halvings) + (2,) * halvings


def check_stem_stride(stem_stride: int, choices: list[int]) -> None:
    """Refuse a stride that a stem cannot have.

    Raises:
        UsageError: `stem_stride` is none of the choices.
    """
    if stem_stride not in choices:
        *first, last = map(str, choices)
        wanted = f"{', '.join(first)} or {last}" if first else last
        raise UsageError(f"stem_stride must be {wanted}, got {stem_stride}")
