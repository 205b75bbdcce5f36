"""Benchmark presets: models exist, match their notes, and quote the published values."""

import csv
from pathlib import Path

import pytest
import timm
import torch

import lightspine
from lightspine.benchmark import count_macs, presets
from lightspine.benchmark.model_specs import ModelSpec, build_model, evaluation_size, parse_model
from lightspine.benchmark.prepare import count_row_macs
from lightspine.benchmark.presets import find_preset, find_published, list_presets
from lightspine.benchmark.settings import BenchSettings, plan_groups
from lightspine.errors import UsageError
from lightspine.models import get_record
from support.checkpoints import put_published_shvit
from support.reference import read_figure

NAMES = (
    "efficientvim-table3",
    "shvit-table",
    "vmamba-throughput",
    "vmamba-steps",
    "vim-resolution",
    "efficientmod-latency",
    "gpu-table",
)
# The official configuration of each ablation step, with a known number of parameters.
STEPS = {
    "vanilla": "vmambav0_tiny_224_a0",
    "a": "vmambav0_tiny_224_a1",
    "c": "vmambav0_tiny_224_a3",
    "d": "vmambav0_tiny_224_a7",
    "d.1": "vmambav0_tiny_224_a7a",
    "d.2": "vmambav0_tiny_224_a8",
    "e": "vmambav2_tiny_224_a9d",
    "e.1": "vmambav2_tiny_224_ds16",
    "e.2": "vmambav2_tiny_224_sr1l5",
}


def _here(name: str) -> list[ModelSpec]:
    return [spec for spec in find_preset(name).specs if spec.absent is None]


def _step(variant: str) -> ModelSpec:
    [spec] = [spec for spec in find_preset("vmamba-steps").specs if spec.variant == variant]
    return spec


def test_presets_are_listed_in_their_order() -> None:
    assert tuple(preset.name for preset in list_presets()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_a_preset_are_valid(name: str) -> None:
    preset = find_preset(name)
    groups = plan_groups(preset.specs, BenchSettings(**preset.settings))
    rows = [job.row.key for group in groups for job in group]
    assert len(rows) == len(set(rows)) > len(_here(name)) // 2


@pytest.mark.parametrize("name", NAMES)
def test_every_model_of_a_preset_can_be_built(name: str) -> None:
    for spec in _here(name):
        with torch.device("meta"):
            model = build_model(spec, *evaluation_size(spec))
        assert sum(parameter.numel() for parameter in model.parameters()) > 10**6


@pytest.mark.parametrize("name", NAMES)
def test_absent_model_is_known_to_nobody(name: str) -> None:
    for spec in find_preset(name).specs:
        if spec.absent == "timm has no such model":
            alike = spec.name.lower().replace("-", "_")
            assert not timm.is_model(alike)
            assert alike not in lightspine.list_models()


@pytest.mark.parametrize("name", NAMES)
def test_present_timm_has_every_model_that_is_not_known_to_be_absent(name: str) -> None:
    missing = [
        spec.name for spec in find_preset(name).specs if f"timm {timm.__version__}" in (spec.absent or "")
    ]
    assert missing == []


def test_model_that_an_older_timm_lacks_is_absent_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_model = timm.is_model
    monkeypatch.setattr(timm, "is_model", lambda name: name != "fasternet_t0" and is_model(name))
    specs = find_preset("shvit-table").specs
    [lacking] = [spec for spec in specs if spec.name == "fasternet_t0"]
    assert lacking.absent == f"timm {timm.__version__} has no such model"
    assert sum(spec.absent is None for spec in specs) == 21


def test_sizes_of_the_sweep_can_be_taken_by_all_its_models() -> None:
    preset = find_preset("vim-resolution")
    largest = preset.settings["sizes"][-1]
    for spec in preset.specs:
        [[job]] = plan_groups([spec], BenchSettings(sizes=(largest,)))
        macs, _ = count_row_macs(job)
        assert macs.total > 10**10


@pytest.mark.parametrize("variant", STEPS)
def test_step_has_the_parameters_of_the_official_configuration(variant: str) -> None:
    expected = read_figure("vmamba/ablations_vmamba")["cases"][STEPS[variant]]["parameters"]
    with torch.device("meta"):
        model = build_model(_step(variant), 224, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("variant", [*STEPS, "f", "g"])
def test_step_has_the_published_multiply_adds(variant: str) -> None:
    spec = _step(variant)
    with torch.device("meta"):
        model = build_model(spec, 224, 224)
    assert spec.published is not None
    assert count_macs(model, (3, 224, 224)).total / 1e9 == pytest.approx(spec.published.macs_g, rel=0.02)


def test_steps_are_told_in_their_order() -> None:
    variants = [spec.variant for spec in find_preset("vmamba-steps").specs]
    assert variants == ["vanilla", "a", "b", "c", "d", "d.1", "d.2", "e", "e.1", "e.2", "f", "g"]
    assert all(spec.note or spec.absent for spec in find_preset("vmamba-steps").specs)


@pytest.mark.parametrize("name", [name for name in lightspine.list_models() if find_published(name)])
def test_published_figures_are_those_of_the_registry(name: str) -> None:
    figures, registered = find_published(name), get_record(name).published
    assert figures is not None
    assert figures.params_m is None or figures.params_m == pytest.approx(
        get_record(name).params / 1e6, rel=0.02
    )
    if registered.macs_g is not None and figures.macs_g is not None:
        assert figures.macs_g == pytest.approx(registered.macs_g, rel=0.02)
    # EfficientMod's repository lists distilled scores; the preset has those without a teacher.
    if not name.startswith("efficientmod"):
        assert figures.top1 == registered.top1


def test_every_published_figure_has_its_source() -> None:
    with (Path(presets.__file__).parent / "published.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({(line["model"], line["variant"]) for line in lines}) == len(lines)
    assert all(line["source"] for line in lines)
    assert all(bool(line["throughput"]) == bool(line["throughput_device"]) for line in lines)


def test_published_figures_stand_only_beside_the_size_they_are_of() -> None:
    spec = _here("vmamba-throughput")[0]
    [own], [other] = plan_groups([spec], BenchSettings(sizes=(None, (448, 448))))
    assert own.row.published is not None
    assert own.row.published.top1 == 82.6
    assert other.row.published is None


def test_same_network_of_timm_has_the_same_published_figures() -> None:
    by_source = {spec.source: spec for spec in _here("shvit-table") if spec.name == "shvit_s1"}
    assert by_source["timm"].published == by_source["lightspine"].published == find_published("shvit_s1")


def test_unknown_preset_is_named_with_the_closest() -> None:
    with pytest.raises(UsageError, match="unknown preset 'vmamba-step'; the closest are vmamba-steps"):
        find_preset("vmamba-step")


def test_prefix_asks_for_the_model_of_timm() -> None:
    assert parse_model("shvit_s1").source == "lightspine"
    assert parse_model("timm/shvit_s1").source == "timm"
    assert parse_model("resnet18").source == "timm"
    with torch.device("meta"):
        theirs = build_model(parse_model("timm/shvit_s1"), 224, 224)
    assert type(theirs).__module__ == "timm.models.shvit"


def test_published_weights_are_measured_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = put_published_shvit(tmp_path, monkeypatch)
    spec = parse_model("shvit_s1.in1k")
    assert (spec.name, spec.variant) == ("shvit_s1", "shvit_s1.in1k")
    model = build_model(spec, *evaluation_size(spec))
    assert torch.equal(model.state_dict()["stem.0.conv.weight"], tensors["patch_embed.0.c.weight"])


def test_prefix_asks_for_the_official_order() -> None:
    with torch.device("meta"):
        official = build_model(parse_model("official/efficientmod_xxs"), 224, 224)
        ours = build_model(parse_model("efficientmod_xxs"), 224, 224)
    assert type(official) is not type(ours)
    assert sum(p.numel() for p in official.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm/shvit_s9", "unknown model 'shvit_s9'; the closest names are shvit_s"),
        (
            "official/vim_tiny",
            "expected official/efficientmod_.*, the only baselines, got 'official/vim_tiny'",
        ),
        ("timm/vim_tiny", "timm has no model 'vim_tiny' of its own: use vim_tiny without timm/"),
    ],
)
def test_unknown_peer_is_named(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_model(name)
