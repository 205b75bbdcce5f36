"""Check of YAML files of others before they are loaded."""

import yaml

from lightspine.errors import UsageError

_LONGEST = 2**20
_DEEPEST = 50
_MOST_NODES = 100_000


def check_yaml_text(text: str, what: str) -> None:
    """Check the size and nesting of a YAML text, with its aliases expanded, before it is loaded.

    A few lines can stand for gigabytes by their aliases.

    Args:
        text: content of the file.
        what: kind of file, for the message.

    Raises:
        UsageError: it is too large or too deep, or a value contains itself.
    """
    if len(text) > _LONGEST:
        raise UsageError(f"expected a {what} of up to {_LONGEST:,} characters, received {len(text):,}")
    sizes: dict[str, int] = {}
    # Size and anchor of each open mapping or sequence.
    open_nodes: list[tuple[int, str | None]] = [(0, None)]
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((1, event.anchor))
            elif isinstance(event, yaml.CollectionEndEvent):
                size, anchor = open_nodes.pop()
                if anchor is not None:
                    sizes[anchor] = size
                _add(open_nodes, size)
            elif isinstance(event, yaml.AliasEvent):
                if any(anchor == event.anchor for _, anchor in open_nodes):
                    raise UsageError(f"expected a {what} whose values do not contain themselves")
                _add(open_nodes, sizes.get(event.anchor, 1))
            elif isinstance(event, yaml.ScalarEvent):
                _add(open_nodes, 1)
            if len(open_nodes) > _DEEPEST:
                raise UsageError(f"expected a {what} nested up to {_DEEPEST} times, received a deeper one")
            if open_nodes[-1][0] > _MOST_NODES:
                raise UsageError(
                    f"expected a {what} of up to {_MOST_NODES:,} values, received more by its aliases"
                )
    except yaml.YAMLError:
        # The loader reports it with the key that it stands for.
        return


def _add(open_nodes: list[tuple[int, str | None]], size: int) -> None:
    total, anchor = open_nodes[-1]
    open_nodes[-1] = total + size, anchor
