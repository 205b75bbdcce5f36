"""Validation of constructor arguments that several model families share."""

from collections.abc import Sequence

from lightspine.errors import UsageError


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an argument has one of its allowed values.

    Raises:
        UsageError: it has another value; the message lists the allowed ones.
    """
    if value not in choices:
        allowed = ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
        raise UsageError(f"{name} must be {allowed}, got {value!r}")


def check_global_pool(global_pool: str, num_classes: int) -> None:
    """Check that the pooling of a classifier is "avg" or, without classes, "".

    Raises:
        UsageError: another pooling, or classes without pooling.
    """
    if global_pool not in ("avg", ""):
        raise UsageError(f"global_pool must be 'avg' or '', got {global_pool!r}")
    if num_classes and not global_pool:
        raise UsageError(f"a classifier needs global_pool='avg', got '' with num_classes={num_classes}")


def stem_strides(stem_stride: int, convolutions: int) -> tuple[int, ...]:
    """Return the stride of each convolution of a stem, all of which are 2 in the published models.

    A smaller stem stride keeps the shape of every weight: the first convolutions get stride 1, the others 2.
    The first ones have the fewest channels, so that the larger maps there cost the least.

    Args:
        stem_stride: product of the strides.
        convolutions: number of convolutions.

    Raises:
        UsageError: `stem_stride` is not a power of two, or too large for the number of convolutions.
    """
    choices = [2**count for count in range(convolutions + 1)]
    check_stem_stride(stem_stride, choices)
    halvings = choices.index(stem_stride)
    return (1,) * (convolutions - halvings) + (2,) * halvings


def check_stem_stride(stem_stride: int, choices: list[int]) -> None:
    """Check that a stem offers a stride.

    Raises:
        UsageError: `stem_stride` is not among the choices.
    """
    if stem_stride not in choices:
        *first, last = map(str, choices)
        allowed = f"{', '.join(first)} or {last}" if first else last
        raise UsageError(f"stem_stride must be {allowed}, got {stem_stride}")
