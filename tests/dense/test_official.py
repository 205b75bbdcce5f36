"""Checkpoints in OpenMMLab's layout: recognition, what is loaded, and what is refused."""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightspine
from lightspine.dense import create_detector, create_segmenter, load_network, save_network
from lightspine.dense.checkpoint import read_network_metadata
from lightspine.errors import LightspineError, UsageError
from lightspine_cli.main import main
from support.reference import read_figure

Layout = dict[str, list[int]]
Write = Callable[..., Path]


def layout_of(figure: str) -> Layout:
    return dict(read_figure(f"dense/{figure}")["checkpoint"])


def ones(layout: Layout) -> dict[str, Tensor]:
    """Return a state dict of ones."""
    return {
        key: torch.ones(shape, dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
        for key, shape in layout.items()
    }


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    path = tmp_path / "published.pth"

    def write_layout(layout: Layout, meta: dict[str, Any] | None = None, **more: Any) -> Path:
        torch.save({"meta": meta or {}, "state_dict": ones(layout)} | more, path)
        return path

    yield write_layout
    # Up to 160 MB.
    path.unlink(missing_ok=True)


def part(figure: str, *prefixes: str) -> Layout:
    return {key: shape for key, shape in layout_of(figure).items() if key.startswith(prefixes)}


def efficientvim_mask_rcnn() -> Layout:
    """Return the layout of EfficientViM's Mask R-CNN, which has SHViT's heads and levels."""
    neck = part("shvit_s4_mask_rcnn", "neck.fpn_convs", "neck.extra")
    laterals = part("efficientvim_m4_retinanet", "neck.lateral_convs", "neck.batch_norm")
    heads = part("shvit_s4_mask_rcnn", "rpn_head.", "roi_head.")
    return part("efficientvim_m4_retinanet", "backbone.") | laterals | neck | heads


def efficientmod_semantic_fpn() -> Layout:
    """Return the layout of EfficientMod's Semantic FPN, whose levels have EfficientMod's widths."""
    head = part("efficientvim_m4_semantic_fpn", "decode_head.")
    return part("efficientmod_s_mask_rcnn", "backbone.", "neck.") | head


SLOW = pytest.mark.slow
NETWORKS = [
    pytest.param("mask_rcnn", "vmamba_tiny", 80, layout_of("vmamba_tiny_s1l8_mask_rcnn"), marks=SLOW),
    pytest.param("upernet", "vmamba_tiny", 150, layout_of("vmamba_tiny_s1l8_upernet"), marks=SLOW),
    pytest.param("retinanet", "shvit_s4", 80, layout_of("shvit_s4_retinanet"), marks=SLOW),
    pytest.param("mask_rcnn", "shvit_s4", 80, layout_of("shvit_s4_mask_rcnn"), marks=SLOW),
    pytest.param("retinanet", "efficientvim_m4", 80, layout_of("efficientvim_m4_retinanet"), marks=SLOW),
    pytest.param("mask_rcnn", "efficientvim_m4", 80, efficientvim_mask_rcnn()),
    pytest.param(
        "semantic_fpn", "efficientvim_m4", 150, layout_of("efficientvim_m4_semantic_fpn"), marks=SLOW
    ),
    pytest.param("mask_rcnn", "efficientmod_s", 80, layout_of("efficientmod_s_mask_rcnn"), marks=SLOW),
    pytest.param("semantic_fpn", "efficientmod_s", 150, efficientmod_semantic_fpn()),
    pytest.param("upernet", "vim_tiny", 150, layout_of("vim_tiny_upernet.layout")),
]


@pytest.mark.parametrize(("head", "model", "classes", "layout"), NETWORKS)
def test_every_tensor_of_a_published_network_is_loaded(
    write: Write, head: Any, model: str, classes: int, layout: Layout
) -> None:
    create: Any = create_detector if classes == 80 else create_segmenter
    network = create(head, model, checkpoint=write(layout))

    assert network.init_args["num_classes"] == classes
    assert not network.load_report.missing
    # Vim's last norm is behind every feature map.
    assert network.load_report.dropped == (["backbone.norm_f.weight"] if model == "vim_tiny" else [])
    assert {name for name, tensor in network.named_parameters() if (tensor != 1).any()} <= {
        # Zeros of the background class, which mmdetection does not have.
        "roi_heads.box_predictor.0.bbox_pred.weight",
        "roi_heads.box_predictor.0.bbox_pred.bias",
        "roi_heads.mask_predictor.mask_fcn_logits.weight",
        "roi_heads.mask_predictor.mask_fcn_logits.bias",
    }


def test_a_file_alone_tells_head_model_classes_and_names(write: Write) -> None:
    found = read_network_metadata(write(layout_of("shvit_s4_retinanet")))
    assert (found.kind, found.head, found.model, found.num_classes) == (
        "detector",
        "retinanet",
        "shvit_s4",
        80,
    )
    assert found.class_names is not None
    assert found.class_names[:2] == ["person", "bicycle"]
    assert found.class_names[-1] == "toothbrush"


def test_a_segmenter_has_ade20ks_names_and_the_published_test(write: Write) -> None:
    found = read_network_metadata(write(layout_of("efficientvim_m4_semantic_fpn")))
    assert found.class_names is not None
    assert (len(found.class_names), found.class_names[7], found.class_names[-1]) == (150, "bed", "flag")
    assert found.settings["scale"] == [512, 2048]
    assert found.settings["divisor"] == 32


@pytest.mark.parametrize("meta", [{"CLASSES": ("cat", "dog")}, {"dataset_meta": {"classes": ["cat", "dog"]}}])
def test_the_class_names_in_the_file_are_used(write: Write, meta: dict[str, Any]) -> None:
    layout = layout_of("shvit_s4_retinanet")
    layout |= {"bbox_head.retina_cls.weight": [18, 256, 3, 3], "bbox_head.retina_cls.bias": [18]}
    found = read_network_metadata(write(layout, meta=meta))
    assert (found.num_classes, found.class_names) == (2, ["cat", "dog"])


def test_the_expected_model_decides_between_equal_backbones(write: Write) -> None:
    network = create_detector("retinanet", "shvit_s4_dist", checkpoint=write(layout_of("shvit_s4_retinanet")))
    assert not network.load_report.missing


def test_a_saved_copy_finds_the_same_objects(write: Write, tmp_path: Path) -> None:
    network, about = load_network(write(layout_of("shvit_s4_retinanet")), resize=None, score_threshold=0.0)
    copy = save_network(network, tmp_path / "copy.safetensors", class_names=about.class_names)
    image = [torch.rand(3, 64, 64)]
    with torch.inference_mode():
        expected, found = network(image)[0], load_network(copy)[0](image)[0]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_other_classes_replace_the_class_layers_and_the_report_says_so(write: Write) -> None:
    path = write(layout_of("efficientmod_s_mask_rcnn"))
    network = create_detector("mask_rcnn", "efficientmod_s", 7, checkpoint=path)
    replaced = {name.rpartition(".")[0] for name in network.load_report.missing}
    assert replaced == {
        "roi_heads.box_predictor.0.cls_score",
        "roi_heads.box_predictor.0.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    }
    assert network.load_report.dropped_head
    assert "6 left at their initial value (roi_heads.box_predictor.0.cls_score.weight" in str(
        network.load_report
    )


def test_another_architecture_is_named_beside_the_expected_one(write: Write) -> None:
    path = write(layout_of("vmamba_tiny_s1l8_mask_rcnn"))
    with pytest.raises(
        UsageError,
        match=r"expected weights of retinanet over shvit_s4, but .*published\.pth holds an OpenMMLab "
        r"checkpoint of mask_rcnn over vmamba_tiny with 80 classes",
    ):
        create_detector("retinanet", "shvit_s4", checkpoint=path)


def test_the_first_tensors_that_do_not_fit_are_named_as_in_the_file(write: Write) -> None:
    layout = layout_of("shvit_s4_retinanet")
    del layout["neck.extra_fpn_convs.0.conv.bias"]
    layout["neck.lateral_convs.0.conv.weight"] = [128, 224, 1, 1]
    layout["neck.surprise.weight"] = [3]
    with pytest.raises(LightspineError) as caught:
        create_detector("retinanet", "shvit_s4", checkpoint=write(layout))
    message = str(caught.value)
    assert (
        "neck.lateral_convs.0.conv.weight is 128x224x1x1 in the file and 256x224x1x1 in the model" in message
    )
    assert "neck.extra_fpn_convs.0.conv.bias is missing in the file" in message
    assert "neck.surprise.weight is not in the model" in message


def test_a_head_of_another_kind_is_named_by_its_tensors(write: Write) -> None:
    layout = part("shvit_s4_mask_rcnn", "backbone.", "neck.", "rpn_head.")
    layout |= {"roi_head.bbox_head.0.fc_cls.weight": [81, 1024]}
    with pytest.raises(LightspineError, match=r"of another head, expected RetinaNet.*roi_head\.bbox_head\.0"):
        load_network(write({key: v for key, v in layout.items() if not key.startswith("rpn_head.")}))


def test_an_unknown_backbone_is_named_by_its_tensors(write: Write) -> None:
    layout = part("shvit_s4_retinanet", "neck.", "bbox_head.")
    layout |= {"backbone.layer1.0.conv1.weight": [64, 64, 1, 1], "backbone.conv1.weight": [64, 3, 7, 7]}
    with pytest.raises(LightspineError, match=r"fits no registered model.*backbone\.layer1\.0\.conv1"):
        load_network(write(layout))


def test_a_classifier_is_not_made_from_a_published_detector(write: Write) -> None:
    with pytest.raises(UsageError, match="holds a detector or segmenter, expected a classifier"):
        lightspine.load_model(write(layout_of("shvit_s4_retinanet")))


def test_a_detector_of_detectron2_is_refused_by_name(write: Write) -> None:
    path = write({"backbone.net.pos_embed": [1, 4, 192], "proposal_generator.rpn_head.conv.weight": [3]})
    with pytest.raises(UsageError, match="holds a detector of detectron2"):
        create_detector("cascade_mask_rcnn", "vim_tiny", 80, checkpoint=path)


def test_convert_writes_a_file_that_describes_itself(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "converted.safetensors"
    assert main(["convert", str(write(layout_of("efficientvim_m4_semantic_fpn"))), str(target)]) == 0
    assert "semantic_fpn over efficientvim_m4, loaded 445 tensors" in capsys.readouterr().out
    network, about = load_network(target)
    assert (about.num_classes, about.settings["resize_twice"]) == (150, True)
    assert next(network.parameters()).eq(1).all()


def test_num_classes_is_needed_without_a_detectors_file() -> None:
    with pytest.raises(UsageError, match="expected num_classes for retinanet over shvit_s1"):
        create_detector("retinanet", "shvit_s1")


def test_the_training_history_in_mmengines_files_is_skipped(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        """Like mmengine's: arrays, and references to its own methods."""

        def __init__(self) -> None:
            self._log_history = np.array([1.0, 2.0])
            self.statistics_methods = {"min": HistoryBuffer.min}

        def min(self) -> float:
            return 0.0

    HistoryBuffer.__module__ = module.__name__
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.min.__qualname__ = "HistoryBuffer.min"
    HistoryBuffer.min.__module__ = module.__name__
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    history = {"log_scalars": {"loss": HistoryBuffer()}, "runtime_info": {"mAP": np.float64(47.3)}}
    path = write(layout_of("shvit_s4_retinanet"), message_hub=history)
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)

    assert read_network_metadata(path).model == "shvit_s4"


def test_info_tells_what_a_published_file_is(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(write(layout_of("efficientvim_m4_semantic_fpn")))]) == 0
    printed = capsys.readouterr().out
    assert "semantic_fpn" in printed
    assert "efficientvim_m4" in printed
    assert "wall, building, sky" in printed
