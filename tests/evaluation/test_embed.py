"""`embed_images`: features equal the network's, and the index maps rows to images."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

import lightspine
from lightspine.data import create_eval_transform, open_image
from lightspine.errors import UsageError
from lightspine.evaluation import InferenceOptions, embed_images
from lightspine.evaluation.classifiers import find_preprocessing
from lightspine.models.factory import load_model
from support.checkpoints import save_small
from support.images import COLOURS, write_folder

SMALL_PARTS = InferenceOptions(part_size=4, batch_size=3)
FAMILIES = ("vmamba_tiny", "vim_tiny", "efficientvim_m1", "shvit_s1", "efficientmod_xxs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embed") / "model.safetensors"
    return save_small(path, classes=list(COLOURS), model="efficientvim_m1", size=64)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("embed") / "images", count=3)


def read_features(folder: Path, column: str) -> dict[str, np.ndarray]:
    with (folder / "index.csv").open(newline="") as file:
        return {
            row["path"]: np.load(folder / "features" / f"{column}-{row['part']}.npy")[int(row["row"])]
            for row in csv.DictReader(file)
        }


def test_pooled_features_give_the_logits(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    embed_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    model, saved = load_model(checkpoint)
    transform = create_eval_transform(find_preprocessing(saved))
    for path, vector in read_features(tmp_path / "out", "pooled").items():
        with torch.no_grad():
            logits = model(transform(open_image(images / path))[None])
            assert torch.allclose(model.head(torch.from_numpy(vector)[None]), logits, atol=1e-4)


def test_stage_is_the_average_of_its_map(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    embed_images(checkpoint, images, tmp_path / "mean", stages=[1], options=SMALL_PARTS)
    embed_images(checkpoint, images, tmp_path / "maps", stages=[1], maps=True, options=SMALL_PARTS)
    means, maps = (read_features(tmp_path / name, "stage1") for name in ("mean", "maps"))
    assert maps["red/0.jpg"].ndim == 3
    assert len(means) == 9
    for path, vector in means.items():
        assert np.allclose(maps[path].mean(axis=(1, 2)), vector, atol=1e-5)


def test_half_written_files_of_a_kill_do_not_stay(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "out" / "features" / ".pooled-000000.npy.77.part"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    embed_images(checkpoint, images, tmp_path / "out", options=SMALL_PARTS)
    names = sorted(path.name for path in leftover.parent.iterdir())
    assert names == ["pooled-000000.npy", "pooled-000001.npy", "pooled-000002.npy"]


def test_unknown_stage_is_refused(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="expected a stage of efficientvim_m1 out of pooled, all, 0, 1, 2, got '7'"
    ):
        embed_images(checkpoint, images, tmp_path / "out", stages=[7])


def test_maps_need_a_stage(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the pooled features have no map"):
        embed_images(checkpoint, images, tmp_path / "out", maps=True)


def test_features_in_parquet_are_those_of_npy(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    embed_images(checkpoint, images, tmp_path / "npy", options=SMALL_PARTS)
    embed_images(checkpoint, images, tmp_path / "parquet", format="parquet", options=SMALL_PARTS)
    table = parquet.read_table(tmp_path / "parquet" / "features.parquet").to_pydict()
    expected = read_features(tmp_path / "npy", "pooled")
    assert table["path"] == list(expected)
    assert np.array_equal(np.array(table["pooled"], dtype=np.float32), np.stack(list(expected.values())))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_stages_have_the_promised_widths(name: str, images: Path, tmp_path: Path) -> None:
    file = save_small(tmp_path / "model.safetensors", classes=list(COLOURS), model=name, size=64)
    embed_images(file, images, tmp_path / "out", stages=["all"], options=SMALL_PARTS)
    model = lightspine.create_model(name)
    widths = [
        read_features(tmp_path / "out", f"stage{number}")["red/0.jpg"].shape
        for number in range(len(model.feature_info))
    ]
    assert widths == [(info["num_chs"],) for info in model.feature_info]
    assert read_features(tmp_path / "out", "pooled")["red/0.jpg"].shape == (model.head_hidden_size,)
