"""The Python blocks of the documentation run; those of one page share a session."""

from pathlib import Path

import pytest
from PIL import Image

import lightspine
from lightspine.data import export_digits
from lightspine.export import export_onnx
from lightspine.heads import FeatureBackbone, build_detector
from support.pages import PAGES, ROOT, blocks, broken_promises, fill_cache, page_name, run_block

# README.md has its own test, which also compares the printed output.
# These pages export models: some 16 s for several precisions, and a minute for a detector.
WITH_CODE = [
    pytest.param(page, marks=pytest.mark.slow) if page.name in ("export.md", "deployment.md") else page
    for page in PAGES
    if blocks(page, "python") and page != ROOT / "README.md"
]


@pytest.mark.parametrize("page", WITH_CODE, ids=page_name)
def test_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "adding.md":
        pytest.skip(
            "its family would stay registered here: test_adding_a_family.py runs it in a process of its own"
        )
    if page.name in ("index.md", "weights.md"):
        fill_cache(tmp_path, monkeypatch)
    if page.name == "export.md":
        # Variables and files that the page assumes.
        export_onnx(lightspine.create_model("shvit_s1", num_classes=3).eval(), tmp_path / "model.onnx")
        Image.effect_noise((80, 97), 40).convert("RGB").save(tmp_path / "image.jpg")
    if page.name == "deployment.md":
        backbone = FeatureBackbone(lightspine.create_model("shvit_s1", features_only=True))
        detector = build_detector("retinanet", backbone, 3, channels=16, resize=None).eval()
        export_onnx(detector, tmp_path / "detector.onnx", with_preprocessing=True, fixed_size=(80, 97))
        Image.effect_noise((97, 80), 40).convert("RGB").save(tmp_path / "image.png")
    if page.name == "analysis.md":
        # The files of `lightspine demo`, with a smaller network.
        small = lightspine.create_model(
            "vmamba_tiny", num_classes=10, embed_dims=(8, 16, 32, 64), depths=[1] * 4
        )
        export_digits(tmp_path / "lightspine-demo" / "images", count=10)
        lightspine.save_checkpoint(small, tmp_path / "lightspine-demo" / "vmamba_tiny.safetensors")
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        assert broken_promises(run_block(block, page_name(page), namespace)) == []


@pytest.mark.parametrize(
    ("block", "broken"),
    [
        ("print(1 + 1)  # 2", []),
        ("print(1 + 1)  # 2: the sum", []),
        ("print(1 + 1)\n# 2", []),
        ("print('a\\nb')\n# a\n# b", []),
        ("print(1 + 1)", []),
        ("print(1 + 1)  # 3", [("2", "3")]),
        ("print(12)  # 1", [("12", "1")]),
        ("print(1)  # 12", [("1", "12")]),
    ],
)
def test_promise_that_differs_from_the_output_is_found(block: str, broken: list[tuple[str, str]]) -> None:
    assert broken_promises(run_block(block, "block", {})) == broken
