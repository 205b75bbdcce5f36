"""Modules of this package under the names of mamba_ssm, causal_conv1d and the extension modules of VMamba."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lightspine.compat.modules import MODULES, is_package, packages


class Replacement(NamedTuple):
    """Installed package that `lightspine.compat.install` replaces.

    Attributes:
        name: top-level name, such as "mamba_ssm".
        reason: why the package itself was not used.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: replaced by lightspine.compat ({self.reason})"


class CompatModule(ModuleType):
    """Replacement module; the error for a missing attribute lists the attributes that exist."""

    def __getattr__(self, name: str) -> Any:
        # Python and its tools look for optional attributes such as __path__ and __wrapped__.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        message = _missing(self.__name__, name)
        if _is_import_statement():
            # Otherwise `from module import name` would raise an error of its own, without this message.
            raise ImportError(message, name=self.__name__)
        raise AttributeError(message, name=name, obj=self)


def _missing(module: str, name: str) -> str:
    content = sorted(key for key in MODULES[module] if not key.startswith("__"))
    content += sorted(_submodules(module))
    return f"lightspine's {module} has no {name!r}: it has {', '.join(content)}"


def _submodules(package: str) -> list[str]:
    return [other for other in MODULES if other.rpartition(".")[0] == package]


def _is_import_statement() -> bool:
    """Return whether the caller's caller is a statement `from module import name`."""
    import opcode

    frame = sys._getframe(2)
    code = frame.f_code.co_code
    return 0 <= frame.f_lasti < len(code) and opcode.opname[code[frame.f_lasti]] == "IMPORT_FROM"


class _Importer(MetaPathFinder, Loader):
    """Import hook for the replaced packages.

    Attributes:
        packages: top-level names.
    """

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        if fullname not in MODULES:
            # Python has imported the parent before.
            parent, _, name = fullname.rpartition(".")
            raise ModuleNotFoundError(_missing(parent, name), name=fullname)
        return ModuleSpec(fullname, self, origin="lightspine.compat", is_package=is_package(fullname))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return CompatModule(spec.name, f"lightspine's replacement of {spec.name}.")

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(MODULES[module.__name__])


_IMPORTER = _Importer()


def install(override: bool = False) -> list[Replacement]:
    """Replace mamba_ssm, causal_conv1d and VMamba's extension modules where they are missing or do not work.

    A package that is missing or does not work here is replaced in `sys.modules`; one that works is left
    alone. It works if it can be imported, and if its scan or convolution of a tiny tensor raises no error, on
    the CUDA device if there is one and else on the CPU. Call this before the code that imports the packages.

    Args:
        override: replace packages that work, too.

    Returns:
        The packages that this call has replaced, with the reasons.
    """
    if _IMPORTER not in sys.meta_path:
        sys.meta_path.insert(0, _IMPORTER)
    replaced = []
    # All are tried before any is replaced: mamba_ssm imports two of the others.
    for name in [name for name in packages() if name not in _IMPORTER.packages]:
        reason = "override=True" if override else _find_fault(name)
        if reason is not None:
            replaced.append(Replacement(name, reason))
    for name, _ in replaced:
        _remove(name)
        _IMPORTER.packages.add(name)
    for name in MODULES:
        if name.partition(".")[0] in _IMPORTER.packages:
            importlib.import_module(name)
    return replaced


def uninstall() -> None:
    """Undo `install`: later imports find the packages themselves, if they are there."""
    for name in _IMPORTER.packages:
        _remove(name)
    _IMPORTER.packages.clear()
    if _IMPORTER in sys.meta_path:
        sys.meta_path.remove(_IMPORTER)


def _find_fault(name: str) -> str | None:
    """Return why a package cannot be used here, or `None`."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        _TRIALS.get(name, _try_extension)(name)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"installed, but does not work here: {lines[0]}"
    return None


def _remove(name: str) -> None:
    """Remove a package and its submodules from `sys.modules`."""
    for module in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[module]


def _trial_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _try_mamba(name: str) -> None:
    module = importlib.import_module(f"{name}.ops.selective_scan_interface")
    sequence, matrix = _trial_tensors()
    module.selective_scan_fn(sequence, sequence, matrix, sequence, sequence)


def _try_convolution(name: str) -> None:
    module = importlib.import_module(name)
    sequence = torch.zeros(1, 8, 8, device=_trial_device())
    module.causal_conv1d_fn(sequence, torch.zeros(8, 4, device=_trial_device()))


def _try_extension(name: str) -> None:
    module = importlib.import_module(name)
    sequence, matrix = _trial_tensors()
    projection = sequence[:, None]
    if name == "selective_scan_cuda":
        module.fwd(sequence, sequence, matrix, projection, projection, None, None, None, True)
    elif name == "selective_scan_cuda_ndstate":
        module.fwd(sequence, sequence, matrix[:, 0], sequence[:, :1], sequence[:, :1], None, None, True, 1)
    elif name == "selective_scan_cuda_oflex":
        module.fwd(sequence, sequence, matrix, projection, projection, None, None, True, 1, True)
    else:
        module.fwd(sequence, sequence, matrix, projection, projection, None, None, True, 1)


def _trial_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a sequence (1, 8, 8), which also serves as a projection (1, N, 8), and a matrix (8, 8)."""
    device = _trial_device()
    return torch.zeros(1, 8, 8, device=device), -torch.ones(8, 8, device=device)


_TRIALS: dict[str, Callable[[str], None]] = {"mamba_ssm": _try_mamba, "causal_conv1d": _try_convolution}
