"""Shipped recipes against the official training code, step by step in float64 through `lightspine train`."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightspine.recipes import find_recipe, list_recipes
from lightspine.training.lr_schedules import CosineSchedule
from support.published_runs import PooledLinear, RebuiltImages, create_run
from support.reference import read_figure

RECIPES = {
    "efficientmod_xxs": "efficientmod_xxs",
    "efficientmod_xxs_dist": "efficientmod_xxs_dist",
    "efficientvim_m1": "efficientvim_m1",
    "efficientvim_m1_128px": "efficientvim_m1",
    "efficientvim_m1_dist": "efficientvim_m1_dist",
    "efficientvim_m1_dist_128px": "efficientvim_m1_dist",
    "shvit_s1": "shvit_s1",
    "shvit_s1_dist": "shvit_s1_dist",
    "vim_tiny": "vim_tiny",
    "vim_tiny_plus": "vim_tiny_plus",
    "vmamba_tiny": "vmamba_tiny",
}
FULL = [pytest.param(name, None, marks=pytest.mark.slow) for name in RECIPES]
# The first has a second epoch with self-distillation.
SHORT = [("efficientvim_m1", 5), ("shvit_s1", 2)]


@pytest.mark.parametrize("name", RECIPES)
def test_inputs_are_those_of_the_published_run(name: str) -> None:
    figure = read_figure(f"training/{name}")
    images, targets = RebuiltImages(figure)[0]
    check = figure["check"]
    assert float(images.sum()) == pytest.approx(check["image_sum"], rel=1e-9)
    assert float(targets.norm()) == pytest.approx(check["target_l2"], rel=1e-12)
    if "teacher_argmax_step0" in check:
        logits = PooledLinear().double()(images).detach()
        assert logits.argmax(1).tolist() == check["teacher_argmax_step0"]
        assert float(logits.norm()) == pytest.approx(check["teacher_logits_l2_step0"], rel=1e-9)


@pytest.mark.parametrize(("name", "steps"), [*SHORT, *FULL])
def test_every_step_is_that_of_the_official_training_code(
    name: str, steps: int | None, tmp_path: Path
) -> None:
    figure = read_figure(f"training/{name}")
    cli, recorder = create_run(name, tmp_path, recipe=f"classification/{RECIPES[name]}", steps=steps)
    cli.train()
    steps = steps or figure["steps"]
    assert len(recorder.steps["loss"]) == steps
    for key in ("weights", "weight_norm", "buffer_norm"):
        assert recorder.initial[key] == pytest.approx(figure["initial"][key], rel=1e-12, abs=1e-15), key
    for quantity, values in recorder.steps.items():
        for step, value in enumerate(values):
            tolerance = step_tolerance(figure, quantity, step)
            if tolerance < 1e-4:
                expected = figure[quantity][step]
                assert value == pytest.approx(expected, rel=tolerance), (quantity, step)
    for step, found in recorder.snapshots.items():
        expected = figure["after"][step]
        for which, sensitivity in zip(("weights", "ema"), figure["sensitivity"]["after"][step], strict=True):
            tolerance = max(1e-9, 100 * sensitivity)
            if tolerance < 1e-4:
                assert found[which] == pytest.approx(expected[which], abs=tolerance, rel=0), (which, step)
        for norm in ("weight_norm", "ema_norm", "buffer_norm", "ema_buffer_norm"):
            tolerance = max(1e-7, *(100 * value for value in figure["sensitivity"]["after"][step]))
            if tolerance < 1e-4:
                assert found[norm] == pytest.approx(expected[norm], rel=tolerance), (norm, step)


def step_tolerance(figure: dict[str, Any], quantity: str, step: int) -> float:
    """Return the relative tolerance of a step: some runs amplify differences in the last bit."""
    if quantity == "lr":
        return 1e-12
    if step == 0:
        return 1e-9
    return max(1e-7, 100 * figure["sensitivity"][quantity][step])


def published_rates() -> list[Any]:
    """Return (family, length, recipe) of every published ImageNet recipe with a recorded schedule."""
    found = []
    for name in list_recipes():
        family, _, variant = name.removeprefix("classification/").partition("_")
        if not name.startswith("classification/") or variant in ("s4_384", "s4_512"):
            continue
        run = {
            "efficientmod": "all",
            "efficientvim": "e450" if variant.endswith("_e450") else "e300",
            "shvit": "main",
            "vim": "ft" if variant.endswith("_plus") else variant,
            "vmamba": "all",
        }[family]
        found.append((family, run, name))
    return found


@pytest.mark.parametrize(("family", "run", "recipe"), published_rates())
def test_rates_of_the_whole_run_are_those_of_the_official_scheduler(
    family: str, run: str, recipe: str
) -> None:
    figure = read_figure(f"training/schedule_{family}")
    content = yaml.safe_load(find_recipe(recipe).read_text())
    task, trainer = content["model"]["init_args"], content["trainer"]
    schedule = CosineSchedule(**task["schedule"])
    # Schedules by epochs are recorded once per epoch.
    per_epoch = figure["steps_per_epoch"] or 1
    assert trainer["max_epochs"] * per_epoch == figure[run]["length"]
    total = content["data"]["init_args"]["batch_size"] * trainer["devices"]
    for step, expected in figure[run]["rates"].items():
        rate = schedule.rate(int(step), lr=task["lr"], steps_per_epoch=per_epoch, total_batch=total)
        assert rate == pytest.approx(expected, rel=1e-12), step
