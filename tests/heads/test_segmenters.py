import pytest
import torch

import lightspine
from lightspine.errors import UsageError
from lightspine.heads import FeatureBackbone, build_segmenter
from support.dense import MEMBERS, NUM_CLASSES, full_backbone, small_backbone, without_gradient

SEGMENTERS = ("semantic_fpn", "upernet")


def make_segmenter(name, member, **options):
    backbone = small_backbone(member, norm="layer")
    return build_segmenter(name, backbone, NUM_CLASSES, **{"channels": 16} | options)


def assert_trains_and_predicts(segmenter, size):
    images = torch.rand(2, 3, *size)
    labels = torch.randint(NUM_CLASSES, (2, *size))
    labels[:, : size[0] // 3] = 255
    losses = segmenter.train()(images, labels)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert without_gradient(segmenter) == []
    with torch.inference_mode():
        logits = segmenter.eval()(images)
    assert logits.shape == (2, NUM_CLASSES, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [(97, 65), (33, 32)])
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_segmenter_trains_and_predicts_over_every_family(name, member, size):
    assert_trains_and_predicts(make_segmenter(name, member), size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    ["vmamba_tiny", "vim_tiny", "efficientvim_m1", "shvit_s1", "efficientmod_xxs", "resnet18"],
)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_published_models_train_and_predict(name, model):
    assert_trains_and_predicts(build_segmenter(name, full_backbone(model), NUM_CLASSES), (97, 161))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_single_map_of_a_plain_backbone_is_enough(name):
    features = lightspine.create_model(
        "test_vit", features_only=True, out_indices=(-1,), dynamic_img_size=True
    )
    assert_trains_and_predicts(build_segmenter(name, FeatureBackbone(features), NUM_CLASSES), (50, 70))


def test_loss_is_a_sum_over_labelled_pixels_over_all_pixels():
    segmenter = make_segmenter("upernet", "shvit").eval()
    images = torch.rand(2, 3, 33, 41)
    labels = torch.randint(NUM_CLASSES, (2, 33, 41))
    labels[0, :20] = 255
    probabilities = segmenter(images).detach().softmax(1)
    total = 0.0
    for i in range(2):
        for y in range(33):
            for x in range(41):
                if labels[i, y, x] != 255:
                    total -= float(probabilities[i, labels[i, y, x], y, x].log())
    loss = segmenter(images, labels)["loss_segmentation"]
    torch.testing.assert_close(loss.item(), total / (2 * 33 * 41), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_batch_without_any_label_has_a_loss_of_zero(name):
    segmenter = make_segmenter(name, "efficientvim").train()
    losses = segmenter(torch.rand(2, 3, 32, 32), torch.full((2, 32, 32), 255))
    sum(losses.values()).backward()
    assert sum(losses.values()) == 0
    assert without_gradient(segmenter) == []


def test_auxiliary_loss_has_its_weight():
    losses = []
    for weight in (0.4, 0.8):
        torch.manual_seed(0)
        segmenter = make_segmenter("upernet", "shvit", auxiliary_weight=weight, dropout=0.0).train()
        torch.manual_seed(1)
        losses.append(segmenter(torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)))
    torch.testing.assert_close(2 * losses[0]["loss_auxiliary"], losses[1]["loss_auxiliary"])
    torch.testing.assert_close(losses[0]["loss_segmentation"], losses[1]["loss_segmentation"])


def test_no_auxiliary_weight_leaves_the_auxiliary_head_out():
    segmenter = make_segmenter("upernet", "shvit", auxiliary_weight=0.0).train()
    losses = segmenter(torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64))
    assert set(losses) == {"loss_segmentation"}
    assert without_gradient(segmenter) != []  # nothing was run backward
    assert segmenter.auxiliary is None


def test_padding_of_a_plain_backbone_leaves_whole_patches_as_they_are():
    segmenter = make_segmenter("semantic_fpn", "vim").eval()
    image = torch.rand(1, 3, 40, 56)
    padded = torch.nn.functional.pad(image, (0, 8, 0, 8))
    torch.testing.assert_close(segmenter(image), segmenter(padded)[..., :40, :56])


def test_decoder_of_three_maps_has_a_fourth_level():
    segmenter = make_segmenter("semantic_fpn", "shvit")
    assert segmenter.decoder.pyramid.strides == (16, 32, 64, 128)


def test_upernet_over_one_image_says_what_it_needs():
    segmenter = make_segmenter("upernet", "shvit").train()
    with pytest.raises(UsageError, match="needs 2 images or more per process in training, got 1"):
        segmenter(torch.rand(1, 3, 192, 192), torch.zeros(1, 192, 192, dtype=torch.int64))


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 16, 16, dtype=torch.int64), torch.zeros(2, 32, 32, dtype=torch.uint8)]
)
def test_labels_of_another_size_or_kind_are_refused(labels):
    with pytest.raises(UsageError, match="labels must be int64 of shape \\(2, 32, 32\\), got"):
        make_segmenter("semantic_fpn", "shvit")(torch.rand(2, 3, 32, 32), labels)


def test_plain_backbone_of_three_maps_is_refused():
    features = lightspine.create_model("vim_tiny", features_only=True, dim=32, depth=4, out_indices=3)
    with pytest.raises(UsageError, match="takes one map or four of a plain backbone, got 3"):
        build_segmenter("upernet", FeatureBackbone(features), NUM_CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "deeplab"}, "must be one of semantic_fpn, upernet, got 'deeplab'"),
        ({"num_classes": 0}, "num_classes must be 1 or more"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight 0 or more, got 3 and -1.0"),
    ],
)
def test_impossible_segmenter_is_refused(arguments, message):
    settings = {"name": "upernet", "num_classes": 3} | arguments
    with pytest.raises(UsageError, match=message):
        build_segmenter(backbone=small_backbone("shvit"), **settings)
