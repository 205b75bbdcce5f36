"""Recipes of somebody else start nothing, fetch nothing and do not fill the memory."""

import sys
import textwrap
from pathlib import Path

import jsonargparse
import pytest

from lightspine.errors import LightspineError, UsageError
from lightspine.training.class_paths import limit_class_paths
from lightspine.training.cli import main
from lightspine.utils.yaml_text import check_yaml_text

RECIPE = """\
seed: 0
model:
  class_path: lightspine.training.classification.ClassificationTask
  init_args:
    model: shvit_s1
    model_args: {embed_dims: [8, 8, 8], depths: [1, 1, 1], partial_dims: [4, 4, 4]}
data:
  class_path: lightspine.data.modules.DigitsDataModule
  init_args: {image_size: 64, batch_size: 64}
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 1
  limit_val_batches: 1
  enable_progress_bar: false
"""


def touching(canary: Path) -> str:
    return f"{{class_path: subprocess.Popen, init_args: {{args: [touch, {canary}]}}}}"


def trainer(option: str) -> str:
    return RECIPE + textwrap.indent(option, "  ")


ATTACKS = {
    "model": lambda spec: RECIPE.replace("model: shvit_s1", f"model: {spec}"),
    "model class": lambda _: RECIPE.replace(
        "lightspine.training.classification.ClassificationTask", "os.system"
    ),
    "data class": lambda _: RECIPE.replace("lightspine.data.modules.DigitsDataModule", "subprocess.Popen"),
    "model_args": lambda spec: RECIPE.replace("model_args: {", f"model_args: {{act_layer: {spec}, "),
    "callback": lambda spec: trainer(f"callbacks: [{spec}]\n"),
    "logger": lambda spec: trainer(f"logger: {spec}\n"),
    "plugin": lambda spec: trainer(f"plugins: [{spec}]\n"),
    "strategy": lambda spec: trainer(f"strategy: {spec}\n"),
    "profiler": lambda spec: trainer(f"profiler: {spec}\n"),
    "devices": lambda spec: trainer(f"devices: {spec}\n"),
    "argument of a strategy": lambda spec: trainer(
        "strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {ddp_comm_state: "
        f"{spec}}}}}\n"
    ),
    "argument of a progress bar": lambda spec: trainer(
        "callbacks: [{class_path: lightning.pytorch.callbacks.RichProgressBar, init_args: {console_kwargs: "
        f"{{file: {spec}}}}}}}]\n"
    ),
    "function": lambda _: trainer(
        "callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: "
        "{on_fit_start: os.abort}}]\n"
    ),
    "download": lambda _: trainer(
        "callbacks: [{class_path: torch.hub.load, init_args: {repo_or_dir: a/b, model: c}}]\n"
    ),
    "module of the folder": lambda _: trainer("callbacks: [{class_path: evil.Callback}]\n"),
    "tag": lambda _: RECIPE + "x: !!python/object/apply:os.abort []\n",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_recipe_starts_nothing(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Callback: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(ATTACKS[attack](touching(canary)))
    with pytest.raises((LightspineError, TypeError)):
        main(["--config", str(tmp_path / "recipe.yaml"), "--folder", str(tmp_path / "run")])
    assert not canary.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("subprocess.Popen", "--trust-class-path subprocess "),
        ("torch.hub.load", "--trust-class-path torch.hub.load "),
    ],
)
def test_refusal_names_the_class_and_the_way_around(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / "recipe.yaml").write_text(trainer(f"callbacks: [{{class_path: {name}}}]\n"))
    with pytest.raises(UsageError, match=rf"refused to import {name}, .*{advice}"):
        main(["--config", str(tmp_path / "recipe.yaml"), "--folder", str(tmp_path / "run")])


def test_trusted_package_is_imported_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my_callbacks.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Mine(pl.Callback):\n"
        "    def on_fit_start(self, trainer, pl_module):\n"
        f"        open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(trainer("callbacks: [{class_path: my_callbacks.Mine}]\n"))
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--folder", str(tmp_path / "run")]
    main([*arguments, "--trust-class-path", "my_callbacks"])
    assert (tmp_path / "ran").exists()
    assert "classes of my_callbacks may run code" in caplog.text


def test_usual_classes_of_lightning_are_allowed(tmp_path: Path) -> None:
    summary = (
        "callbacks: [{class_path: lightning.pytorch.callbacks.ModelSummary, init_args: {max_depth: 1}}]\n"
    )
    (tmp_path / "recipe.yaml").write_text(trainer(summary))
    result = main(["--config", str(tmp_path / "recipe.yaml"), "--folder", str(tmp_path / "run")])
    assert result.folder.is_dir()


def test_settings_of_the_process_are_restored() -> None:
    before = dict(jsonargparse._common.parsing_settings)
    with limit_class_paths(["my_package"]):
        assert jsonargparse._common.parsing_settings != before
    assert jsonargparse._common.parsing_settings == before


def test_trusted_package_must_be_a_name() -> None:
    with pytest.raises(UsageError, match="expected a package such as my_package for --trust-class-path"):
        main(["--trust-class-path", "../evil.py"])


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "up to 100,000 values, received more by its aliases"),
        ("a: " + "[" * 20000 + "]" * 20000, "nested up to 50 times"),
        ("a: " + "x" * 2**20, "up to 1,048,576 characters"),
    ],
    ids=["aliases", "nesting", "length"],
)
def test_recipe_that_would_fill_the_memory_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_yaml_text(text, "recipe")


def test_usual_aliases_pass() -> None:
    check_yaml_text("a: &size {x: 1}\nb: *size\nc: [*size, *size]\n", "recipe")
