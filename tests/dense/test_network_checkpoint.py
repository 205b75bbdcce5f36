"""Detector and segmenter checkpoints: round trip, and initial weights for another network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lightspine
from lightspine.dense import create_detector, create_segmenter, load_network, save_network
from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import NETWORK_KEY

DETECTOR: dict[str, Any] = {"channels": 32, "resize": (64, 96), "freeze_batch_norm": True}
CLASSES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = create_detector("mask_rcnn", "efficientvim_m1", 3, norm="layer", **DETECTOR)
    path = tmp_path_factory.mktemp("network") / "detector.safetensors"
    return save_network(network, path, class_names=CLASSES, metadata={"val_box_AP": "12.5"})


def test_loaded_detector_finds_what_the_saved_one_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_detector("retinanet", "shvit_s1", 3, score_threshold=0.0, **DETECTOR).eval()
    path = save_network(network, tmp_path / "detector.safetensors", class_names=CLASSES)
    image = [torch.rand(3, 70, 97)]
    with torch.inference_mode():
        expected, found = network(image)[0], load_network(path)[0](image)[0]
    assert len(expected["boxes"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_loaded_segmenter_gives_the_logits_of_the_saved_one(tmp_path: Path) -> None:
    arguments = {"img_size": 64, "depth": 4, "out_indices": [0, 1, 2, 3]}
    network = create_segmenter("upernet", "vim_tiny", 5, model_args=arguments, channels=16).eval()
    path = save_network(network, tmp_path / "segmenter.safetensors")
    image = torch.rand(1, 3, 64, 80)
    with torch.inference_mode():
        torch.testing.assert_close(load_network(path)[0](image), network(image), rtol=0, atol=0)


def test_file_tells_classes_options_and_score(detector_file: Path) -> None:
    saved = load_network(detector_file)[1]
    assert (saved.kind, saved.head, saved.model, saved.class_names, saved.metadata["val_box_AP"]) == (
        "detector",
        "mask_rcnn",
        "efficientvim_m1",
        CLASSES,
        "12.5",
    )
    assert saved.options == {"model_args": {}, "norm": "layer", "resize_rounding": "nearest", **DETECTOR}


def test_detector_of_a_file_without_rounding_resizes_as_it_was_trained(
    detector_file: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old.safetensors"
    with safe_open(str(detector_file), framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    description = json.loads(metadata[NETWORK_KEY])
    del description["options"]["resize_rounding"]
    save_file(tensors, str(old), metadata | {NETWORK_KEY: json.dumps(description)})

    assert load_network(old)[0].transform.rounding == "down"
    assert load_network(detector_file)[0].transform.rounding == "nearest"


def test_same_classes_load_every_tensor(detector_file: Path) -> None:
    network = create_detector(
        "mask_rcnn", "efficientvim_m1", 3, norm="layer", checkpoint=detector_file, **DETECTOR
    )
    assert not network.load_report.missing


def test_other_classes_leave_the_predictors_new(detector_file: Path) -> None:
    network = create_detector(
        "mask_rcnn", "efficientvim_m1", 7, norm="layer", checkpoint=detector_file, **DETECTOR
    )
    parts = {name.rpartition(".")[0] for name in network.load_report.missing}
    assert parts == {
        "roi_heads.box_predictor.0.cls_score",
        "roi_heads.box_predictor.0.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    }


def test_classifier_weights_reach_the_maps(tmp_path: Path) -> None:
    classifier = lightspine.create_model("shvit_s1", num_classes=10)
    path = lightspine.save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    network = create_segmenter("semantic_fpn", "shvit_s1", 4, checkpoint=path)
    weights = network.backbone.model.state_dict()
    expected = {f"model.{name}": value for name, value in classifier.state_dict().items()}
    shared = weights.keys() & expected.keys()
    assert len(shared) > 100
    assert all(torch.equal(weights[name], expected[name]) for name in shared)


def test_other_head_is_refused(detector_file: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"weights of retinanet over efficientvim_m1, but .* holds mask_rcnn .*--model.head=mask_rcnn",
    ):
        create_detector("retinanet", "efficientvim_m1", 3, checkpoint=detector_file)


def test_other_width_is_refused(detector_file: Path) -> None:
    with pytest.raises(LightspineError, match=r"; the file was saved with channels=32, but"):
        create_detector(
            "mask_rcnn", "efficientvim_m1", 3, norm="layer", checkpoint=detector_file, channels=16
        )


@pytest.mark.parametrize("classes", [3, 5])
def test_arguments_that_differ_from_the_files_are_named(classes: int, tmp_path: Path) -> None:
    stride = {"stem_stride": 8}
    network = create_detector("retinanet", "shvit_s1", 3, channels=16, model_args=stride)
    path = save_network(network, tmp_path / "a.safetensors")
    with pytest.raises(
        LightspineError,
        match=r"; the file was saved with model_args=\{'stem_stride': 8\}, channels=16, "
        r"but the network has model_args=\{\}, channels=32",
    ):
        create_detector("retinanet", "shvit_s1", classes, channels=32, checkpoint=path)


def test_classifier_is_not_made_of_a_detector(detector_file: Path) -> None:
    with pytest.raises(UsageError, match="holds a detector or segmenter, expected a classifier's weights"):
        lightspine.load_model(detector_file)


def test_classifier_file_is_no_network(tmp_path: Path) -> None:
    path = lightspine.save_checkpoint(lightspine.create_model("shvit_s1"), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="expected a detector or segmenter in"):
        load_network(path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"head": "yolo"}, "expected a detector among retinanet, mask_rcnn, cascade_mask_rcnn, got 'yolo'"),
        ({"model_args": {"num_classes": 3}}, "expected model_args without num_classes"),
        ({"model_args": {"wings": 2}}, "shvit_s1 has no argument 'wings'"),
        ({"frozen_stages": 1}, "frozen stages of shvit_s1 would keep random weights"),
    ],
)
def test_wrong_argument_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        create_detector(**{"head": "retinanet", "model": "shvit_s1", "num_classes": 2} | arguments)


def test_other_number_of_class_names_is_refused(tmp_path: Path) -> None:
    network = create_segmenter("semantic_fpn", "shvit_s1", 4)
    with pytest.raises(UsageError, match="expected 4 class names, got 1"):
        save_network(network, tmp_path / "a.safetensors", class_names=["sky"])
