"""What becomes of each kind of module in an inference copy: one rule per kind, a file per family."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn as nn

from lightspine.optimize.norms import fold_sequence

Rule = Callable[[Any], Any]
RuleType = TypeVar("RuleType", bound=Rule)

_RULES: dict[type[nn.Module], Rule] = {}


def inference_rule(kind: type[nn.Module]) -> Callable[[RuleType], RuleType]:
    """Decorate a function, or a module's class, that maps a module of this very kind to its inference form.

    The children of what it is given are in their inference form already. It may change what it is given: a
    copy.

    Raises:
        ValueError: the kind has a rule.
    """

    def decorate(rule: RuleType) -> RuleType:
        if kind in _RULES:
            raise ValueError(f"{kind.__name__} has two inference rules")
        _RULES[kind] = rule
        return rule

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule for a module, or `None` when it stays as it is."""
    found = _RULES.get(type(module))
    # A subclass that overrides `forward` may do more than call its layers in turn.
    if found is None and isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return fold_sequence
    return found


# A family is any module here: a sixth one adds its rules without an edit.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
