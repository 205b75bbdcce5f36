import pytest
import torch

from lightspine.errors import UsageError
from lightspine.heads import build_detector
from support.dense import (
    MEMBERS,
    NUM_CLASSES,
    few_proposals,
    full_backbone,
    scene,
    small_backbone,
    without_gradient,
    without_objects,
)

DETECTORS = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")


def make_detector(name, member, **options):
    backbone = small_backbone(member, norm="layer")
    detector = build_detector(name, backbone, NUM_CLASSES, **{"channels": 32, "resize": None} | options)
    return few_proposals(detector)


def assert_predictions(detector, images):
    detector.eval()
    with torch.inference_mode():
        predictions = detector(images)
    for image, found in zip(images, predictions, strict=True):
        count = len(found["scores"])
        assert found["boxes"].shape == (count, 4)
        assert set(found["labels"].tolist()) <= set(range(1, NUM_CLASSES + 1))
        height, width = image.shape[1:]
        limits = torch.tensor([width, height, width, height])
        assert ((found["boxes"] >= 0) & (found["boxes"] <= limits + 1e-3)).all()
        if "masks" in found:
            assert found["masks"].shape == (count, 1, height, width)
    return predictions


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_trains_and_predicts_over_every_family(name, member):
    # A threshold of 0 so that an untrained detector predicts something.
    detector = make_detector(name, member, score_threshold=0.0).train()
    images, targets = scene()
    losses = detector(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert without_gradient(detector) == []
    predictions = assert_predictions(detector, images)
    assert all(len(found["scores"]) for found in predictions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    ["vmamba_tiny", "vim_tiny", "efficientvim_m1", "shvit_s1", "efficientmod_xxs", "resnet18"],
)
@pytest.mark.parametrize("name", DETECTORS)
def test_published_models_train_and_predict(name, model):
    detector = build_detector(name, full_backbone(model), NUM_CLASSES, resize=(64, 128))
    few_proposals(detector).train()
    images, targets = scene()
    losses = detector(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert without_gradient(detector) == []
    assert_predictions(detector, images)


@pytest.mark.parametrize("name", DETECTORS)
def test_batch_without_any_object_trains_every_parameter(name):
    detector = make_detector(name, "efficientvim").train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 33, 47)]
    losses = detector(images, [without_objects(64, 64), without_objects(33, 47)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert without_gradient(detector) == []


@pytest.mark.parametrize("size", [(32, 32), (33, 35), (1, 1)])
@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_small_images_are_predicted(name, size):
    assert_predictions(make_detector(name, "shvit", score_threshold=0.0), [torch.rand(3, *size)])


def test_prediction_of_an_image_does_not_depend_on_its_neighbours():
    detector = make_detector("retinanet", "efficientmod", score_threshold=0.0).eval()
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 90)]
    alone, beside = detector(images[:1])[0], detector(images)[0]
    torch.testing.assert_close(alone["scores"], beside["scores"])


def test_resizing_gives_boxes_and_masks_of_the_image_as_given():
    detector = make_detector("mask_rcnn", "shvit", resize=(64, 100), score_threshold=0.0)
    assert_predictions(detector, [torch.rand(3, 150, 90)])


def test_finer_maps_than_needed_leave_no_parameter_behind():
    backbone = small_backbone("vmamba", norm="layer")
    detector = build_detector("retinanet", backbone, NUM_CLASSES, channels=16)
    assert backbone.strides == (8, 16, 32)
    assert detector.backbone.strides == (8, 16, 32, 64, 128)


def test_images_are_normalised_as_the_backbone_was_trained():
    backbone = small_backbone("timm")
    detector = build_detector("retinanet", backbone, NUM_CLASSES, channels=16, resize=None)
    mean, std = (torch.tensor(x)[:, None, None] for x in (backbone.image_mean, backbone.image_std))
    image = torch.rand(3, 32, 32)
    torch.testing.assert_close(detector.transform([image])[0].tensors[0], (image - mean) / std)


@pytest.mark.parametrize("name", [*DETECTORS[:2], pytest.param(DETECTORS[2], marks=pytest.mark.slow)])
def test_autocast_keeps_boxes_in_full_precision(name):
    detector = make_detector(name, "efficientmod", score_threshold=0.0).train()
    images, targets = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(images, targets)
        found = detector.eval()(images)[0]
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert found["boxes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, "labels must be 1 to 3, target 0 has 0 to 1"),
        ({"labels": torch.tensor([1, 4])}, "labels must be 1 to 3, target 0 has 1 to 4"),
        ({"labels": torch.tensor([1])}, "target 0 has 2 boxes, so its labels must be int64 of shape"),
        ({"boxes": torch.zeros(2, 5)}, "floats of shape \\(N, 4\\), got \\(2, 5\\)"),
        ({"masks": torch.zeros(2, 5, 5)}, "masks of target 0 must have shape \\(2, 97, 65\\), got"),
        (
            {"boxes": torch.tensor([[0.0, 0, 9, 9], [5, 5, 5, 9]])},
            "x1 < x2 and y1 < y2, target 0 has \\[5.0, 5.0, 5.0, 9.0\\]",
        ),
    ],
)
def test_target_that_does_not_fit_is_refused(change, message):
    images, targets = scene()
    with pytest.raises(UsageError, match=message):
        make_detector("mask_rcnn", "shvit").train()(images, [targets[0] | change, targets[1]])


def test_missing_masks_are_named():
    images, targets = scene()
    del targets[1]["masks"]
    with pytest.raises(UsageError, match="target 1 has no 'masks'"):
        make_detector("mask_rcnn", "shvit").train()(images, targets)


@pytest.mark.parametrize("name", DETECTORS)
def test_training_without_targets_is_refused(name):
    with pytest.raises(UsageError, match="in training needs a target for every image"):
        make_detector(name, "shvit").train()([torch.rand(3, 32, 32)])


def test_fewer_targets_than_images_are_refused():
    images, targets = scene()
    with pytest.raises(UsageError, match="got 2 images and 1 targets"):
        make_detector("retinanet", "shvit").train()(images, targets[:1])


def test_image_of_bytes_is_refused():
    with pytest.raises(UsageError, match="image 0 must be a \\(C, H, W\\) tensor of floats"):
        make_detector("retinanet", "shvit").eval()([torch.zeros(3, 32, 32, dtype=torch.uint8)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("yolo", 3), "must be one of retinanet, mask_rcnn"), (("retinanet", 0), "num_classes must be 1 or")],
)
def test_impossible_detector_is_refused(arguments, message):
    name, num_classes = arguments
    with pytest.raises(UsageError, match=message):
        build_detector(name, small_backbone("shvit"), num_classes)


@pytest.mark.parametrize("name", DETECTORS)
def test_saved_weights_give_the_same_predictions(name, tmp_path):
    detector = make_detector(name, "efficientvim", score_threshold=0.0)
    torch.save(detector.state_dict(), tmp_path / "detector.pth")
    torch.manual_seed(7)
    other = make_detector(name, "efficientvim", score_threshold=0.0)
    other.load_state_dict(torch.load(tmp_path / "detector.pth", weights_only=True))
    image = [torch.rand(3, 50, 70)]
    expected, found = (assert_predictions(d, image)[0] for d in (detector, other))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", DETECTORS)
def test_anchor_scale_shrinks_the_anchors(name):
    sides = []
    for scale in (1.0, 0.5):
        detector = make_detector(name, "timm", anchor_scale=scale)
        anchors = (detector if name == "retinanet" else detector.rpn).anchor_generator
        boxes = anchors.cell_anchors[0]
        sides.append((boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt())
    torch.testing.assert_close(sides[1], sides[0] / 2)


def test_anchors_without_a_size_are_refused():
    with pytest.raises(UsageError, match="anchor_scale must be above 0, got 0"):
        make_detector("retinanet", "timm", anchor_scale=0)
