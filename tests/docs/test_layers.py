"""CONTRIBUTING.md quotes the layers that import-linter checks."""

import tomllib

from support.pages import ROOT, blocks


def test_layers_of_contributing_are_those_of_pyproject() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [contract for contract in linter["contracts"] if contract["type"] == "layers"]
    assert contract["exhaustive"] is True
    (quoted,) = blocks(ROOT / "CONTRIBUTING.md", "text")
    assert quoted.splitlines() == contract["layers"]
