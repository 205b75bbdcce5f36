"""CascadeRoIHeads against torchvision's heads, and the behaviour of its stages."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from lightspine.errors import UsageError
from lightspine.heads.mask_rcnn import CASCADE, CascadeRoIHeads, Stage

CLASSES = 4  # with the background
SIZES = [(128, 160), (120, 96)]


class AgnosticPredictor(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(width, CLASSES), nn.Linear(width, 4)

    def forward(self, x):
        return self.cls_score(x), self.bbox_pred(x)


def make_parts():
    return {
        "box_roi_pool": MultiScaleRoIAlign(["4", "8"], 7, 2),
        "mask_roi_pool": MultiScaleRoIAlign(["4", "8"], 14, 2),
        "mask_head": MaskRCNNHeads(8, [16], 1),
        "mask_predictor": MaskRCNNPredictor(16, 16, CLASSES),
    }


def make_torchvision(parts, head, predictor):
    settings = {
        "fg_iou_thresh": 0.5,
        "bg_iou_thresh": 0.5,
        "batch_size_per_image": 512,
        "positive_fraction": 0.25,
        "bbox_reg_weights": None,
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "detections_per_img": 100,
    }
    return RoIHeads(**parts, box_head=head, box_predictor=predictor, **settings).double()


def make_ours(parts, heads, predictors, stages, **options):
    return CascadeRoIHeads(
        box_heads=heads, box_predictors=predictors, stages=stages, **parts, **options
    ).double()


def make_input():
    torch.manual_seed(1)
    features = {
        str(stride): torch.randn(2, 8, 128 // stride, 160 // stride, dtype=torch.float64) for stride in (4, 8)
    }
    corners = torch.rand(2, 60, 2, dtype=torch.float64) * 60
    proposals = list(torch.cat([corners, corners + 4 + torch.rand_like(corners) * 30], dim=2))
    targets = []
    for boxes, (height, width) in zip(proposals, SIZES, strict=True):
        masks = (torch.rand(3, height, width) > 0.4).to(torch.uint8)
        targets.append({"boxes": boxes[:3] + 1.5, "labels": torch.tensor([1, 2, 3]), "masks": masks})
    return features, proposals, targets


def run(heads, training):
    features, proposals, targets = make_input()
    torch.manual_seed(2)
    results, losses = heads.train(training)(features, proposals, SIZES, targets if training else None)
    return results, losses


def assert_same(ours, theirs):
    results, losses = run(ours, True)
    expected_results, expected_losses = run(theirs, True)
    assert results == expected_results == []
    assert losses.keys() == expected_losses.keys()
    for name, loss in expected_losses.items():
        assert loss > 0
        torch.testing.assert_close(losses[name], loss, rtol=1e-12, atol=0, msg=name)
    predictions, expected = run(ours, False)[0], run(theirs, False)[0]
    assert all(len(found["scores"]) > 10 for found in expected)
    for found, wanted in zip(predictions, expected, strict=True):
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


def test_one_stage_equals_torchvisions_mask_rcnn():
    parts, head, predictor = make_parts(), TwoMLPHead(8 * 49, 32), FastRCNNPredictor(32, CLASSES)
    theirs = make_torchvision(parts, head, predictor)
    ours = make_ours(parts, [head], [predictor], [Stage()], smooth_l1_beta=1 / 9, exact_masks=False)
    assert_same(ours, theirs)


def test_one_stage_that_moves_all_classes_alike_equals_torchvisions_with_repeated_weights():
    parts, head, agnostic = make_parts(), TwoMLPHead(8 * 49, 32), AgnosticPredictor(32)
    predictor = FastRCNNPredictor(32, CLASSES)
    predictor.cls_score.load_state_dict(agnostic.cls_score.state_dict())
    predictor.bbox_pred.weight = nn.Parameter(agnostic.bbox_pred.weight.detach().repeat(CLASSES, 1))
    predictor.bbox_pred.bias = nn.Parameter(agnostic.bbox_pred.bias.detach().repeat(CLASSES))
    theirs = make_torchvision(parts, head, predictor)
    ours = make_ours(parts, [head], [agnostic], [Stage()], smooth_l1_beta=1 / 9, exact_masks=False)
    assert_same(ours, theirs)


def make_cascade():
    heads = [TwoMLPHead(8 * 49, 32) for _ in CASCADE]
    return make_ours(make_parts(), heads, [AgnosticPredictor(32) for _ in CASCADE], CASCADE)


def test_stages_that_move_nothing_predict_the_proposals_with_the_mean_probability():
    cascade = make_cascade()
    for predictor in cascade.box_predictor:
        nn.init.zeros_(predictor.bbox_pred.weight)
        nn.init.zeros_(predictor.bbox_pred.bias)
    cascade.nms_thresh = 1.0
    cascade.detections_per_img = 10_000
    features, proposals, _ = make_input()
    found, _ = cascade.eval()(features, proposals[:1], SIZES[:1])
    crops = cascade.box_roi_pool(features, proposals[:1], SIZES[:1])
    stages = zip(cascade.box_head, cascade.box_predictor, strict=True)
    mean = sum(predictor(head(crops))[0].softmax(-1) for head, predictor in stages) / 3
    expected = mean[:, 1:].flatten()
    expected = expected[expected > cascade.score_thresh].sort(descending=True).values
    torch.testing.assert_close(found[0]["scores"], expected)


def test_later_stages_ask_for_more_overlap():
    cascade = make_cascade()
    box = torch.tensor([[0.0, 0.0, 100.0, 100.0]], dtype=torch.float64)
    target = {"boxes": box, "labels": torch.tensor([2])}
    wide = torch.tensor([[0.0, 0.0, 100.0, side] for side in (55.0, 65.0, 75.0)], dtype=torch.float64)
    labels = [cascade._match_boxes(stage, [wide], [target]).labels[0].tolist() for stage in range(3)]
    assert labels == [[2, 2, 2], [0, 2, 2], [0, 0, 2]]


def test_each_stage_sends_its_share_of_the_gradient_into_the_pyramid():
    cascade = make_cascade().train()
    features, proposals, _ = make_input()
    gradients = {}
    for training in (True, False):
        cascade.train(training)
        x = {name: feature.clone().requires_grad_() for name, feature in features.items()}
        logits, _ = cascade._run_stage(0, x, proposals, SIZES)
        logits.sum().backward()
        gradients[training] = x["4"].grad
    torch.testing.assert_close(3 * gradients[True], gradients[False])


def test_masks_to_learn_are_cropped_at_pixel_centres():
    cascade = make_cascade()
    masks = torch.zeros(1, 40, 40, dtype=torch.uint8)
    masks[0, 10:20, 10:20] = 1
    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0]], dtype=torch.float64)
    crop = cascade._crop_masks(masks, boxes, torch.tensor([0]), 40)
    torch.testing.assert_close(crop, masks.double())


def test_training_without_targets_is_refused():
    features, proposals, _ = make_input()
    with pytest.raises(UsageError, match="training needs targets"):
        make_cascade().train()(features, proposals, SIZES)


def test_stages_without_their_heads_are_refused():
    with pytest.raises(UsageError, match="one entry per stage, got 3, 1 and 1"):
        make_ours(make_parts(), [TwoMLPHead(8, 8)], [AgnosticPredictor(8)], CASCADE)
