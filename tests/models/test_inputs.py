"""What every family accepts as images, and how it refuses the rest; tracing and export of plain models."""

import io

import pytest
import torch
from torch import nn

import lightspine
from lightspine.errors import UsageError
from support.tiny_models import SMALLEST, tiny_images, tiny_model


@pytest.fixture(scope="module", params=SMALLEST)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Shared, so tests must not change it."""
    return tiny_model(request.param).float()


def test_an_empty_batch_gives_no_logits(model):
    empty = tiny_images().float()[:0]
    assert model(empty).shape == (0, 5)
    assert lightspine.optimize(model)(empty).shape == (0, 5)
    maps = model.forward_intermediates(empty, intermediates_only=True)
    assert all(len(each) == 0 for each in maps)


def test_an_image_without_batch_axis_is_refused(model):
    with pytest.raises(UsageError, match=r"shape \(B, C, H, W\), received \(3, 64, 64\): add a batch axis"):
        model(tiny_images().float()[0])


def test_images_of_whole_numbers_are_refused(model):
    with pytest.raises(UsageError, match=r"floating dtype, .* received torch\.uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("family", SMALLEST)
def test_training_on_one_small_image_works_or_is_explained(family):
    model = tiny_model(family).train()
    if family in ("shvit", "efficientvim"):
        with pytest.raises(UsageError, match="at least two images or more than 64 pixels"):
            model(tiny_images(1))
    else:
        assert model(tiny_images(1)).shape == (1, 5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_traced_model_passes_the_check_and_trains(model):
    images = tiny_images().float()
    traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(images), model(images))
    model.zero_grad()
    traced(images).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.endswith("mixer.A"))
    torch.jit.save(traced, io.BytesIO())


def test_plain_onnx_export_of_shvit(tmp_path):
    import onnxruntime

    model, images = tiny_model("shvit").float(), tiny_images().float()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-3, atol=1e-4)
