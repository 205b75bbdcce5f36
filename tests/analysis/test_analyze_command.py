"""`lightspine analyze`: output files and usage errors."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lightspine
from lightspine.models.saving import save_checkpoint
from lightspine_cli.main import main
from support.images import write_folder, write_image


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("analyze")
    sizes = {
        "vmamba_tiny": {"depths": [1, 1], "embed_dims": [8, 16]},
        "vim_tiny": {"depth": 2, "dim": 16},
        "shvit_s1": {},
        "efficientmod_xxs": {},
        "efficientvim_m1": {},
    }
    return {
        name: save_checkpoint(
            lightspine.create_model(name, num_classes=3, **more),
            folder / f"{name}.safetensors",
            class_names=["blue", "green", "red"],
        )
        for name, more in sizes.items()
    }


def analyze(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


@pytest.mark.parametrize(
    ("kind", "name", "more", "array"),
    [
        ("erf", "shvit_s1", ["--stage", "0"], "trained_shares"),
        ("cam", "efficientmod_xxs", ["--class", "red", "--stage", "1"], "cam_stages.1"),
        ("attention", "vmamba_tiny", ["--query", "10,60"], "readers"),
        ("attention", "vim_tiny", ["--query", "class"], "kept"),
        ("context", "efficientmod_xxs", [], "stages.0.blocks.1.mlp.context"),
        ("importance", "efficientvim_m1", ["--stage", "0"], "write_stages.0.blocks.0.mixer"),
        ("redundancy", "efficientmod_xxs", [], "modules"),
    ],
)
def test_picture_drawing_and_numbers_are_written(
    kind: str, name: str, more: list[str], array: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    image, out = write_image(tmp_path / "seen.png", (9, 99, 200), size=(90, 70)), tmp_path / "out"
    assert analyze(kind, checkpoints[name], image, "--out", out, "--size", "64x96", *more) == 0
    base = kind if kind in ("erf", "redundancy") else "seen"
    with np.load(out / f"{base}.npz") as arrays:
        assert array in arrays.files
    ET.parse(out / f"{base}.svg")
    with Image.open(out / f"{base}.png") as picture:
        assert picture.width > 300


def test_folder_gives_every_image_its_files_and_a_contact_sheet(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "images", count=1)
    out = tmp_path / "out"
    assert analyze("cam", checkpoints["shvit_s1"], folder, "--out", out, "--size", 64) == 0
    assert sorted(path.name for path in out.glob("*.npz")) == ["blue_0.npz", "green_0.npz", "red_0.npz"]
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height > 400
    # All images are called 0.jpg: a row has the name of its files. Matplotlib writes text as a comment, too.
    drawn = (out / "contact_sheet.svg").read_text()
    assert all(f"<!-- {name}_0 -->" in drawn for name in ("blue", "green", "red"))
    said = capsys.readouterr().out
    assert "maps of 3 images" in said
    assert "40x40 px seen as 64x64" in said


def test_same_call_writes_the_same_bytes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", (9, 99, 200))
    for out in ("one", "two"):
        assert analyze("cam", checkpoints["shvit_s1"], image, "--out", tmp_path / out, "--size", 64) == 0
    for kind in ("png", "svg"):
        assert (tmp_path / "one" / f"a.{kind}").read_bytes() == (tmp_path / "two" / f"a.{kind}").read_bytes()


def test_redundancy_scores_a_labelled_folder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", count=1)
    arguments = ("--data", folder, "--out", tmp_path / "out", "--size", 64)
    assert analyze("redundancy", checkpoints["efficientmod_xxs"], folder, *arguments) == 0
    with np.load(tmp_path / "out" / "redundancy.npz") as arrays:
        changes = [arrays[name] for name in arrays.files if name.startswith("change_")]
    assert all(change.shape == (8,) for change in changes)


def test_results_never_take_the_place_of_their_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_image(tmp_path / "a.png", (9, 99, 200))
    before = image.read_bytes()
    assert analyze("cam", "shvit_s1", image, "--out", tmp_path) == 2
    assert "expected --out to be another folder than that of the image" in capsys.readouterr().err
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cam", "shvit_s1", "gone.png"], "expected an image file, but gone.png does not exist"),
        (["cam", "shvit_s1", "IMAGE", "--query", "1,2"], "--query is only for attention, got cam"),
        (["attention", "shvit_s1", "IMAGE", "--query", "1;2"], "expected --query as Y,X in pixels or class"),
        (["attention", "shvit_s1", "IMAGE", "--query", "900,2"], "expected a query Y,X from 0,0 to 223,223"),
        (["cam", "shvit_s1", "IMAGE", "--size", "big"], "expected --size as HxW or N in pixels, or native"),
        (["context", "shvit_s1", "IMAGE"], "shvit_s1 has no context layers"),
        (["cam", "shvit_s1", "IMAGE", "--out", "IMAGE"], "expected a folder for --out, got the file"),
    ],
)
def test_wrong_call_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(write_image(tmp_path / "a.png", (9, 99, 200)))
    given = [image if argument == "IMAGE" else argument for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert analyze(*given, *out) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_computing_imports_neither_matplotlib_nor_lightning() -> None:
    loaded = "any(name in sys.modules for name in ('matplotlib', 'lightning'))"
    code = f"import sys, lightspine.analysis; sys.exit({loaded})"
    subprocess.run([sys.executable, "-c", code], check=True)
