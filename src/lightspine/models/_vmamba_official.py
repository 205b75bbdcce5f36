"""What the official VMamba repository calls things: its constructor's arguments and its checkpoints' keys."""

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.models._vmamba_blocks import check_choice

_OUT_NORMS = {
    "onnone": "none",
    "ondwconv3": "dwconv",
    "oncnorm": "layer_dwconv",
    "onsoftmax": "softmax",
    "onsigmoid": "sigmoid",
}
# Which kernels and precisions they use is all that sets the first row's members apart.
_SCAN_ORDERS = dict.fromkeys(("v0", "v0seq", "v01", "v02", "v04", "v05", "v2"), "cross2d") | {
    "v051d": "unidirectional",
    "v052d": "bidirectional",
}
# Official argument -> ours, where the value carries over as it is.
_SAME = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "ssm_d_state": "state_dim",
    "ssm_ratio": "ssm_ratio",
    "ssm_dt_rank": "dt_rank",
    "ssm_act_layer": "ssm_act",
    "ssm_conv_bias": "ssm_conv_bias",
    "ssm_drop_rate": "ssm_drop_rate",
    "ssm_init": "ssm_init",
    "mlp_ratio": "mlp_ratio",
    "mlp_act_layer": "mlp_act",
    "mlp_drop_rate": "mlp_drop_rate",
    "drop_path_rate": "drop_path_rate",
    "patch_norm": "patch_norm",
    "downsample_version": "downsample",
    "patchembed_version": "stem",
    "posembed": "pos_embed",
    "imgsize": "img_size",
}
# `ssm_rank_ratio` has no effect there; checkpointing is `set_grad_checkpointing` here.
_WITHOUT_EFFECT = ("ssm_rank_ratio", "use_checkpoint")
_SPECIAL = ("patch_size", "depths", "dims", "ssm_conv", "forward_type", "norm_layer", "gmlp")
_NEEDED = ("depths", "dims", "ssm_d_state", "ssm_ratio", "ssm_conv", "forward_type", "mlp_ratio")
_NEEDED_TOO = ("downsample_version", "patchembed_version")


def options_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate arguments of the official VMamba constructor (`VSSM`) into those of `VMamba`.

    Args:
        config: such as `{"dims": 96, "depths": [2, 2, 8, 2], "forward_type": "v05_noz", ...}`. All that
            decides the network's shape has to be there; the rest takes `VMamba`'s defaults.

    Returns:
        Keyword arguments of `VMamba`.

    Raises:
        UsageError: an argument is missing or unknown, or asks for what is not offered: the cascaded scan
            (`v052dc`), a gated MLP, batch norm, a patch size other than 4.

    Examples:
        >>> options_from_official({
        ...     "dims": 96, "depths": [2, 2, 5, 2], "ssm_d_state": 1, "ssm_ratio": 2.0, "ssm_conv": 3,
        ...     "forward_type": "v051d_nozact_oact", "mlp_ratio": 4.0, "downsample_version": "v3",
        ...     "patchembed_version": "v2",
        ... })["gate"]
        'linear'
    """
    known = (*_SAME, *_SPECIAL, *_WITHOUT_EFFECT)
    if unknown := [key for key in config if key not in known]:
        raise UsageError(f"unknown arguments of the official VMamba: {', '.join(unknown)}")
    if missing := [key for key in (*_NEEDED, *_NEEDED_TOO) if key not in config]:
        raise UsageError(f"the official VMamba configuration lacks {', '.join(missing)}")
    if config.get("patch_size", 4) != 4:
        raise UsageError(f"patch_size must be 4, got {config['patch_size']}")
    if config.get("gmlp", False):
        raise UsageError("the gated MLP of the official code (gmlp) is not offered, expected gmlp=False")
    # Both name the same layer norm, on maps of different layouts.
    check_choice("norm_layer", str(config.get("norm_layer", "ln")).lower(), ("ln", "ln2d"))

    options = {ours: config[theirs] for theirs, ours in _SAME.items() if theirs in config}
    depths, dims = config["depths"], config["dims"]
    options["depths"] = tuple(depths)
    options["embed_dims"] = (
        tuple(dims * 2**i for i in range(len(depths))) if isinstance(dims, int) else tuple(dims)
    )
    options["ssm_conv_size"] = config["ssm_conv"] if config["ssm_conv"] > 1 else 0
    options |= _parse_forward_type(config["forward_type"])
    return options


def _parse_forward_type(forward_type: str) -> dict[str, Any]:
    """Translate the string in which the official code packs its switches, such as "v05_onnone_noz"."""
    core, *tags = forward_type.split("_")
    if core.endswith("c") and core[:-1] in _SCAN_ORDERS:
        raise UsageError(f"forward_type {forward_type!r} asks for the cascaded scan, which is not offered")
    check_choice("the first part of forward_type", core, tuple(_SCAN_ORDERS))
    if core in ("v0", "v0seq"):
        if tags:
            raise UsageError(f"forward_type {core!r} takes no suffix, got {forward_type!r}")
        # What the official code fixes whatever its other arguments say.
        return {
            "gate": "silu",
            "scan_order": "cross2d",
            "ssm_act": "silu",
            "ssm_conv_size": 3,
            "ssm_conv_bias": True,
        }
    options: dict[str, Any] = {
        "gate": "silu",
        "out_norm": "layer",
        "out_act": False,
        "scan_order": _SCAN_ORDERS[core],
    }
    for tag in tags:
        check_choice("a suffix of forward_type", tag, ("noz", "nozact", "oact", "no32", *_OUT_NORMS))
        if tag in _OUT_NORMS:
            options["out_norm"] = _OUT_NORMS[tag]
        elif tag == "oact":
            options["out_act"] = True
        elif tag in ("noz", "nozact"):
            options["gate"] = "none" if tag == "noz" else "linear"
    return options


# Tried in order; the first that matches the start of a key is applied. Where a pattern has two names, the
# second is that of January 2024.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"patch_embed\.(0|proj)\.", "stem.conv1."),
        (r"patch_embed\.(2|norm)\.", "stem.norm1."),
        (r"patch_embed\.5\.", "stem.conv2."),
        (r"patch_embed\.7\.", "stem.norm2."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(norm|ln_1)\.", r"stages.\1.blocks.\2.norm1."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(norm2|ln_2)\.", r"stages.\1.blocks.\2.norm2."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(op|self_attention)\.", r"stages.\1.blocks.\2.ssm."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.", r"stages.\1.blocks.\2.mlp."),
        (r"classifier\.(norm|head)\.", r"\1."),
    )
]
_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.downsample\.(1\.|3\.|norm\.|reduction\.)(.+)")
_DOWNSAMPLE_PARTS = {"1.": "conv.", "3.": "norm.", "norm.": "norm.", "reduction.": "reduction."}
_OUT_NORM = re.compile(r"outnorm(\d+)\.(.+)")
_SSM_RENAMES = {
    "A_logs": "A_log",
    "Ds": "D",
    "dt_projs_weight": "dt_weight",
    "dt_projs_bias": "dt_bias",
    "x_proj_weight": "x_proj.weight",
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "out_norm.1.weight": "out_norm.weight",
    "out_norm.2.weight": "out_norm.1.weight",
}


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the published keys of a whole model to ours.

    Also taken: the names of January 2024, 1x1 convolutions in place of linear maps, and the layout for dense
    tasks, which has a norm for each stage and no classifier: its last norm becomes `norm`, the other three,
    for which a classification model has no place, are left out. Keys that are none of these stay as they are.
    """
    converted: dict[str, Tensor] = {}
    ssm: dict[str, dict[str, Tensor]] = {}
    last = max((int(m[1]) for m in map(_OUT_NORM.fullmatch, state_dict) if m), default=-1)
    for key, tensor in state_dict.items():
        if out_norm := _OUT_NORM.fullmatch(key):
            if int(out_norm[1]) == last and "classifier.norm.weight" not in state_dict:
                converted[f"norm.{out_norm[2]}"] = tensor
            continue
        name = _rename(key)
        prefix, found, leaf = name.partition(".ssm.")
        if found:
            ssm.setdefault(f"{prefix}.ssm.", {})[leaf] = tensor
        else:
            converted[name] = _as_matrix(name, tensor)
    for prefix, entries in ssm.items():
        converted |= {prefix + name: tensor for name, tensor in convert_ss2d(entries).items()}
    return converted


def convert_ss2d(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the published keys of one SS2D module to ours.

    The official input projection holds the scanned half and, below it, the gate; ours are two matrices.
    """
    converted = {
        _SSM_RENAMES.get(key, key): _as_matrix(key, tensor) if key.endswith("_proj.weight") else tensor
        for key, tensor in state_dict.items()
    }
    if "dt_weight" not in converted or "out_proj.weight" not in converted:
        return converted
    directions, inner, _ = converted["dt_weight"].shape
    if "A_log" in converted:
        converted["A_log"] = converted["A_log"].reshape(directions, inner, -1)
    if "x_proj.weight" in converted:
        converted["x_proj.weight"] = converted["x_proj.weight"].reshape(-1, inner)
    in_proj = converted.get("in_proj.weight")
    if in_proj is not None and in_proj.shape[0] == 2 * inner:
        # Clones: two parts of one storage could not be saved as safetensors.
        converted["in_proj.weight"], converted["gate_proj.weight"] = (
            half.clone() for half in in_proj.chunk(2)
        )
    return converted


def resize_pos_embed(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Resize a position table (1, C, H, W) by bicubic interpolation, as the official loader does."""
    if pos_embed.shape[2] == height and pos_embed.shape[3] == width:
        return pos_embed
    resized = F.interpolate(pos_embed.float(), size=[height, width], mode="bicubic", align_corners=False)
    return resized.to(pos_embed.dtype)


def _rename(key: str) -> str:
    if found := _DOWNSAMPLE.fullmatch(key):
        # The official stage ends with its downsampling, ours begins with it.
        return f"stages.{int(found[1]) + 1}.downsample.{_DOWNSAMPLE_PARTS[found[2]]}{found[3]}"
    for pattern, replacement in _RENAMES:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def _as_matrix(name: str, tensor: Tensor) -> Tensor:
    linear = name.endswith(("_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight"))
    return tensor.flatten(1) if linear and tensor.ndim == 4 else tensor
