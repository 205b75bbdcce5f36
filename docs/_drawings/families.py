"""Drawings of the five architectures: their stages, with the widths of one variant, and a block."""

import torch
from svg import Drawing, chain

import lightspine


def _stages(drawing: Drawing, name: str, stem: str, stage: list[tuple[str, str]], head: str) -> None:
    """Draw the stages of a model in a row; the widths and strides are those of the model itself."""
    with torch.device("meta"):
        model = lightspine.create_model(name)
    drawing.text(20, 28, f"{name}, as built", size=14, anchor="start")
    x, y, width = 20, 46, 104
    boxes = [(stem, "conv")]
    for number, info in enumerate(model.feature_info):
        label, kind = stage[number]
        boxes.append((f"{label}\n{info['num_chs']} wide\nstride {info['reduction']}", kind))
    boxes.append((head, "token"))
    for number, (label, kind) in enumerate(boxes):
        if number:
            drawing.arrow((x - 18, y + 40), (x, y + 40))
        drawing.box(x, y, width, 80, label, kind)
        x += width + 18


def _residual(drawing: Drawing, x: float, top: float, bottom: float, sign: str = "+") -> None:
    """Draw the way around a branch, from above it to where it is added."""
    drawing.arrow((x, top), (x + 110, top), (x + 110, bottom), (x + 10, bottom), dashed=True)
    drawing.plus(x, bottom, sign)


def vmamba() -> Drawing:
    """VMamba."""
    drawing = Drawing("VMamba: four stages of VSS blocks", 780, 560)
    _stages(
        drawing,
        "vmamba_tiny",
        "stem\ntwo 3x3\nstride 4",
        [("VSS blocks", "scan")] * 4,
        "LayerNorm\npool\nlinear",
    )
    drawing.text(150, 170, "VSS block", size=14)
    block = chain(drawing, 75, 205, [("LayerNorm", "plain"), ("SS2D", "scan")])
    drawing.arrow((150, 190), (150, 205))
    drawing.arrow(block[-1], (150, 305))
    _residual(drawing, 150, 192, 315)
    drawing.arrow((150, 325), (150, 350))
    mlp = chain(drawing, 75, 350, [("LayerNorm", "plain"), ("MLP, 4 times wide\nGELU", "mix")])
    drawing.arrow(mlp[-1], (150, 465))
    _residual(drawing, 150, 337, 475)
    drawing.text(520, 170, "SS2D", size=14)
    inner = chain(
        drawing,
        420,
        190,
        [
            ("linear", "mix"),
            ("depthwise 3x3, SiLU", "conv"),
            ("linear: dt, B, C\nfor each direction", "mix"),
            ("scan in four directions,\noutputs added", "scan"),
            ("LayerNorm", "plain"),
            ("linear", "mix"),
        ],
        width=200,
        gap=16,
    )
    drawing.text(
        inner[-1][0], inner[-1][1] + 24, "nothing is gated in the shipped models", size=12, pale=True
    )
    return drawing


def vim() -> Drawing:
    """Vim."""
    drawing = Drawing("Vim: one sequence of tokens, scanned in both directions", 780, 560)
    drawing.text(20, 28, "vim_tiny", size=14, anchor="start")
    boxes = [
        ("patches\n16 x 16, linear", "conv"),
        ("class token into\nthe middle\n+ positions", "token"),
        ("24 blocks\n192 wide\nstride 16", "scan"),
        ("RMSNorm\nof the class\ntoken", "plain"),
        ("linear", "token"),
    ]
    for number, (label, kind) in enumerate(boxes):
        x = 20 + 150 * number
        if number:
            drawing.arrow((x - 24, 86), (x, 86))
        drawing.box(x, 46, 126, 80, label, kind)
    drawing.text(390, 165, "block: add, norm, mixer", size=14)
    drawing.arrow((390, 175), (390, 190))
    drawing.box(315, 190, 150, 33, "RMSNorm")
    drawing.arrow((390, 223), (390, 240))
    drawing.box(315, 240, 150, 33, "linear: x and z", "mix")
    for x, name, note in [(215, "forward", "causal"), (565, "backward", "reversed")]:
        drawing.arrow((390, 273), (390, 285), (x, 285), (x, 300))
        drawing.box(x - 95, 300, 190, 33, f"{note} conv 4, SiLU", "conv")
        drawing.arrow((x, 333), (x, 347))
        drawing.box(x - 95, 347, 190, 33, "linear: dt, B, C", "mix")
        drawing.arrow((x, 380), (x, 394))
        drawing.box(x - 95, 394, 190, 33, f"{name} scan, 16 states", "scan")
        drawing.arrow((x, 427), (x, 455), (400 if x > 390 else 380, 455))
    drawing.plus(390, 455)
    drawing.text(390, 420, "gated by SiLU(z)", size=12, pale=True)
    drawing.arrow((390, 465), (390, 485))
    drawing.box(315, 485, 150, 33, "half, then linear", "mix")
    drawing.arrow((390, 518), (390, 540))
    drawing.text(
        400, 550, "added to the stream at the next block's start", size=12, anchor="start", pale=True
    )
    return drawing


def efficientvim() -> Drawing:
    """EfficientViM."""
    drawing = Drawing("EfficientViM: channel mixing inside the hidden states", 780, 560)
    _stages(
        drawing,
        "efficientvim_m1",
        "stem\nfour 3x3\nstride 16",
        [("blocks", "scan")] * 3,
        "hidden states\nof all stages\nfused",
    )
    drawing.text(150, 165, "block", size=14)
    top = 180.0
    for label, kind in [
        ("depthwise 3x3", "conv"),
        ("LayerNorm, HSM-SSD", "scan"),
        ("depthwise 3x3", "conv"),
        ("1x1, 4 times wide, 1x1", "mix"),
    ]:
        drawing.arrow((150, top), (150, top + 22))
        drawing.box(65, top + 22, 170, 33, label, kind)
        drawing.arrow((150, top + 55), (150, top + 68))
        drawing.arrow((150, top + 10), (262, top + 10), (262, top + 78), (160, top + 78), dashed=True)
        drawing.plus(150, top + 78, "~")
        top += 88
    drawing.text(150, top + 22, "~ is a learnt blend of both", size=12, pale=True)
    drawing.text(540, 165, "HSM-SSD on L tokens, N states", size=14)
    chain(
        drawing,
        430,
        180,
        [
            ("1x1 and depthwise 3x3:\nB, C, dt for each state", "conv"),
            ("W = softmax of dt\nover the L tokens", "attention"),
            ("h = x (W B)   C x N", "scan"),
            ("gate and mix channels\nin h: N columns, not L", "mix"),
            ("y = h C   C x L", "scan"),
        ],
        width=220,
        gap=20,
    )
    return drawing


def shvit() -> Drawing:
    """SHViT."""
    drawing = Drawing("SHViT: single-head attention on part of the channels", 780, 520)
    _stages(
        drawing,
        "shvit_s1",
        "stem\nfour 3x3\nstride 16",
        [("blocks with-\nout attention", "conv"), ("blocks", "attention"), ("blocks", "attention")],
        "pool\nBatchNorm\nlinear",
    )
    drawing.text(150, 170, "block", size=14)
    top = 185.0
    for label, kind in [("depthwise 3x3", "conv"), ("SHSA", "attention"), ("1x1, twice as wide, 1x1", "mix")]:
        drawing.arrow((150, top), (150, top + 22))
        drawing.box(65, top + 22, 170, 33, label, kind)
        drawing.arrow((150, top + 55), (150, top + 68))
        drawing.arrow((150, top + 10), (262, top + 10), (262, top + 78), (160, top + 78), dashed=True)
        drawing.plus(150, top + 78)
        top += 88
    drawing.text(540, 170, "SHSA", size=14)
    drawing.box(400, 190, 120, 48, "a part of\nthe channels", "attention")
    drawing.box(550, 190, 150, 48, "the others,\nuntouched")
    drawing.arrow((460, 238), (460, 262))
    drawing.box(370, 262, 180, 48, "norm, 1x1: q, k of 16\nand v, as wide as the part", "mix")
    drawing.arrow((460, 310), (460, 334))
    drawing.box(370, 334, 180, 33, "one attention head", "attention")
    drawing.arrow((460, 367), (460, 402), (500, 402), (500, 415))
    drawing.arrow((625, 238), (625, 402), (580, 402), (580, 415))
    drawing.box(450, 415, 180, 33, "join, ReLU, 1x1", "mix")
    return drawing


def efficientmod() -> Drawing:
    """EfficientMod."""
    drawing = Drawing("EfficientMod: modulation blocks, then attention", 780, 500)
    _stages(
        drawing,
        "efficientmod_xxs",
        "7x7\nstride 4",
        [("modulation", "conv")] * 2 + [("modulation,\nattention", "attention")] * 2,
        "LayerNorm\npool\nlinear",
    )
    drawing.text(390, 170, "modulation block", size=14)
    drawing.arrow((390, 180), (390, 195))
    drawing.box(315, 195, 150, 33, "LayerNorm")
    drawing.arrow((390, 228), (390, 240), (230, 240), (230, 255))
    drawing.arrow((390, 228), (390, 240), (550, 240), (550, 255))
    drawing.box(130, 255, 200, 33, "linear", "mix")
    drawing.arrow((230, 288), (230, 302))
    drawing.box(130, 302, 200, 33, "depthwise 7x7, GELU", "conv")
    drawing.arrow((230, 335), (230, 349))
    drawing.box(130, 349, 200, 33, "linear: the context", "mix")
    drawing.box(450, 255, 200, 48, "linear, r times as wide,\nGELU where r > 1", "mix")
    drawing.arrow((230, 382), (230, 410), (380, 410))
    drawing.arrow((550, 303), (550, 410), (400, 410))
    drawing.plus(390, 410, "x")
    drawing.text(240, 404, "repeated r times", size=12, anchor="start", pale=True)
    drawing.arrow((390, 420), (390, 438))
    drawing.box(290, 438, 200, 33, "linear, scaled, added", "mix")
    return drawing
