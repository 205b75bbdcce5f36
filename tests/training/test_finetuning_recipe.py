"""The fine-tuning recipe for an image folder, through the command line, on photographs."""

import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightspine.errors import UsageError
from lightspine.training.cli import main, train_recipe
from support.images import shared_archive, write_folder
from support.training import SMALL_MODEL

SMALL = [
    f"--model.model={SMALL_MODEL}",
    "--data.image_size=64",
    "--data.batch_size=16",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
]


def extract_flowers(root: Path, classes: tuple[str, ...], **counts: int) -> Path:
    """Unpack the first images of some classes of the flowers."""
    taken: Counter[tuple[str, str]] = Counter()
    with tarfile.open(shared_archive("flowers5_160.tar.gz")) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 4 or parts[2] not in classes:
                continue
            split, kind = parts[1:3]
            if taken[split, kind] < counts[split]:
                taken[split, kind] += 1
                archive.extract(member, root, filter="data")
    return root / "flowers5_160"


@pytest.mark.slow
def test_finetuning_recipe_learns_other_flowers(tmp_path: Path) -> None:
    first = extract_flowers(tmp_path / "first", ("daisy", "dandelion", "roses"), train=100, val=10)
    other = extract_flowers(tmp_path / "other", ("sunflowers", "tulips"), train=60, val=40)
    source = train_recipe(
        "image_folder",
        folder=tmp_path / "source",
        progress=False,
        overrides=[*SMALL, f"--data.root={first}", "--trainer.max_epochs=6"],
    )
    tuned = train_recipe(
        "finetune_image_folder",
        folder=tmp_path / "tuned",
        progress=False,
        overrides=[
            *SMALL,
            f"--model.checkpoint={source.weights}",
            "--model.lr=2e-3",
            f"--data.root={other}",
            "--trainer.max_epochs=6",
        ],
    )
    # Chance level is 40 of 80.
    assert tuned.score >= 65
    before, after = load_file(source.weights), load_file(tuned.weights)
    frozen = {key for key in before if key.startswith(("conv1.", "bn1."))}
    assert frozen
    assert {key for key in before if torch.equal(before[key], after[key])} == frozen
    assert after["fc.weight"].shape[0] == 2


def test_finetuning_recipe_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", count=4)
    with pytest.raises(UsageError, match=f"frozen stages of {SMALL_MODEL} .* give a checkpoint"):
        main(
            [
                "--config",
                "finetune_image_folder",
                *SMALL,
                f"--data.root={root}",
                "--folder",
                str(tmp_path / "run"),
            ]
        )
