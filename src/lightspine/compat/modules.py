"""The modules that `lightspine.compat.install` offers under the names of other packages."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lightspine.compat import causal_conv1d as conv
from lightspine.compat import cuda_extensions, norms, selective_scan, utilities
from lightspine.compat.mamba import Block, Mamba
from lightspine.compat.state_update import selective_state_update


def _named(*objects: Any) -> dict[str, Any]:
    return {item.__name__: item for item in objects}


def _extension(fwd: Any, bwd: Any) -> dict[str, Any]:
    return {"fwd": fwd, "bwd": bwd}


_CONVOLUTIONS = _named(conv.causal_conv1d_fn, conv.causal_conv1d_update)
_NORMS = _named(norms.RMSNorm, norms.layer_norm_fn, norms.rms_norm_fn)

MODULES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The versions of the interfaces, for code that compares them.
        "mamba_ssm": {"__version__": "1.2.2+lightspine"}
        | _named(selective_scan.selective_scan_fn, selective_scan.mamba_inner_fn, Mamba),
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.mamba_simple": _named(Mamba, Block),
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": _named(
            selective_scan.selective_scan_fn,
            selective_scan.selective_scan_ref,
            selective_scan.mamba_inner_fn,
            selective_scan.mamba_inner_fn_no_out_proj,
            selective_scan.bimamba_inner_fn,
        ),
        "mamba_ssm.ops.triton": {},
        # The name since version 2, and the one before.
        "mamba_ssm.ops.triton.layer_norm": _NORMS,
        "mamba_ssm.ops.triton.layernorm": _NORMS,
        "mamba_ssm.ops.triton.selective_state_update": _named(selective_state_update),
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": _named(utilities.GenerationMixin, utilities.InferenceParams),
        "mamba_ssm.utils.hf": _named(utilities.load_config_hf, utilities.load_state_dict_hf),
        "causal_conv1d": {"__version__": "1.6.1+lightspine"} | _CONVOLUTIONS,
        "causal_conv1d.causal_conv1d_interface": _CONVOLUTIONS,
        "selective_scan_cuda": _extension(cuda_extensions.mamba_fwd, cuda_extensions.mamba_bwd),
        "selective_scan_cuda_core": _extension(cuda_extensions.core_fwd, cuda_extensions.core_bwd),
        "selective_scan_cuda_nrow": _extension(cuda_extensions.core_fwd, cuda_extensions.core_bwd),
        "selective_scan_cuda_oflex": _extension(cuda_extensions.oflex_fwd, cuda_extensions.core_bwd),
        "selective_scan_cuda_ndstate": _extension(cuda_extensions.ndstate_fwd, cuda_extensions.ndstate_bwd),
    }
)
"""Content of every module by its full name; a module with submodules here is a package."""


def packages() -> list[str]:
    """Return the top-level names, such as "mamba_ssm"."""
    return [name for name in MODULES if "." not in name]


def is_package(name: str) -> bool:
    """Return whether a module has submodules."""
    return any(other.startswith(f"{name}.") for other in MODULES)
