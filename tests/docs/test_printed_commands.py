"""The commands and options in the documentation exist."""

import argparse
import re
import shlex

import pytest

from lightspine.recipes import list_recipes
from lightspine_cli.main import COMMANDS, parser_of
from support.pages import PAGES, ROOT, commands, page_name

PRINTED = [
    pytest.param(line, id=f"{page_name(page)}: {line[:60]}")
    for page in PAGES
    for line in dict.fromkeys(commands(page))
]
# Options of the trainer's own parser besides the sections of a recipe.
OF_TRAIN = (
    "--model.",
    "--data",
    "--trainer.",
    "--config",
    "--lr",
    "--folder",
    "--resume",
    "--save-every-steps",
    "--seed",
)


def _options(parser: argparse.ArgumentParser, words: list[str]) -> set[str]:
    """Return the options of a parser and of the sub-parser selected by the words."""
    known = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words and words[0] in action.choices:
            known |= _options(action.choices[words[0]], words[1:])
    return known


@pytest.mark.parametrize("line", PRINTED)
def test_printed_command_exists(line: str) -> None:
    _, command, *words = shlex.split(line)
    assert command in COMMANDS
    typed = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    if command == "train":
        assert [option for option in typed if not option.startswith(OF_TRAIN)] == []
    else:
        assert typed <= _options(parser_of(command), words) | {"--debug"}


@pytest.mark.parametrize("line", [param for param in PRINTED if "--config" in param.values[0]])
def test_printed_recipe_exists(line: str) -> None:
    words = shlex.split(line)
    recipe = words[words.index("--config") + 1]
    assert recipe in list_recipes() or recipe.upper() == recipe or "NAME" in recipe


def test_every_command_is_in_the_readme() -> None:
    assert {line.split()[1] for line in commands(ROOT / "README.md")} >= set(COMMANDS)
