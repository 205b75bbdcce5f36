"""The published checkpoint layout of any VMamba configuration: key -> shape."""

import math
from typing import Any

Layout = dict[str, list[int]]


def published_layout(config: dict[str, Any]) -> Layout:
    """Return the layout for arguments of the official constructor, such as a figure's "variant"."""
    depths, dim = config["depths"], config["dims"]
    layout: Layout = {}
    if config["posembed"]:
        side = config["imgsize"] // 4
        layout["pos_embed"] = [1, dim, side, side]
    if config["patchembed_version"] == "v1":
        layout |= _conv("patch_embed.0", dim, 3, 4) | _norm("patch_embed.2", dim)
    else:
        layout |= _conv("patch_embed.0", dim // 2, 3, 3) | _norm("patch_embed.2", dim // 2)
        layout |= _conv("patch_embed.5", dim, dim // 2, 3) | _norm("patch_embed.7", dim)
    for i, depth in enumerate(depths):
        width = dim * 2**i
        for j in range(depth):
            prefix = f"layers.{i}.blocks.{j}"
            layout |= _norm(f"{prefix}.norm", width)
            layout |= {f"{prefix}.op.{key}": shape for key, shape in ss2d_layout(width, config).items()}
            if config["mlp_ratio"] > 0:
                hidden = int(width * config["mlp_ratio"])
                layout |= _norm(f"{prefix}.norm2", width)
                layout |= _linear(f"{prefix}.mlp.fc1", hidden, width) | _linear(
                    f"{prefix}.mlp.fc2", width, hidden
                )
        prefix = f"layers.{i}.downsample"
        if i == len(depths) - 1:
            continue
        if config["downsample_version"] == "v1":
            layout |= {f"{prefix}.reduction.weight": [2 * width, 4 * width]} | _norm(
                f"{prefix}.norm", 4 * width
            )
        else:
            layout |= _conv(f"{prefix}.1", 2 * width, width, 3) | _norm(f"{prefix}.3", 2 * width)
    last = dim * 2 ** (len(depths) - 1)
    return layout | _norm("classifier.norm", last) | _linear("classifier.head", config["num_classes"], last)


def ss2d_layout(dim: int, config: dict[str, Any]) -> Layout:
    """Return the layout of one SS2D module of `dim` channels."""
    kind, n = config["forward_type"], config["ssm_d_state"]
    inner, rank = int(dim * config["ssm_ratio"]), math.ceil(dim / 16)
    layout = {
        "x_proj_weight": [4, rank + 2 * n, inner],
        "A_logs": [4 * inner, n],
        "Ds": [4 * inner],
        "dt_projs_weight": [4, inner, rank],
        "dt_projs_bias": [4, inner],
        "in_proj.weight": [inner if "noz" in kind.split("_") else 2 * inner, dim],
        "out_proj.weight": [dim, inner],
    }
    if config["ssm_conv"] > 1:
        layout["conv2d.weight"] = [inner, 1, 3, 3]
        if config["ssm_conv_bias"]:
            layout["conv2d.bias"] = [inner]
    if "ondwconv3" in kind:
        return layout | {"out_norm.1.weight": [inner, 1, 3, 3]}
    return layout if "_on" in kind else layout | _norm("out_norm", inner)


def _norm(key: str, dim: int) -> Layout:
    return {f"{key}.weight": [dim], f"{key}.bias": [dim]}


def _linear(key: str, out_dim: int, in_dim: int) -> Layout:
    return {f"{key}.weight": [out_dim, in_dim], f"{key}.bias": [out_dim]}


def _conv(key: str, out_dim: int, in_dim: int, side: int) -> Layout:
    return {f"{key}.weight": [out_dim, in_dim, side, side], f"{key}.bias": [out_dim]}
