"""What a detector or a segmenter finds in one image, and its drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.detection import encode_mask
from lightspine.data.segmentation import SegmentationTest
from lightspine.dense import SavedNetwork
from lightspine.evaluation.dense.segmenter import eval_transform
from lightspine.utils.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class DensePrediction:
    """What was found in one image.

    Attributes:
        path: the image.
        objects: of a detector, the likeliest first: `name`, `score`, `box` (left, top, right, bottom in
            pixels) and, with a mask head, `mask` (compressed run lengths, as in COCO files).
        shares: of a segmenter: class name -> share of the pixels, the largest first.
        picture: the drawing, if one was made.
    """

    path: Path
    objects: list[dict[str, Any]] | None = None
    shares: dict[str, float] | None = None
    picture: Path | None = None


class Finder(Protocol):
    """Finds objects or classes of pixels."""

    def find(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Return what is in an image of a path, drawn into a picture where one is asked for."""
        ...


@dataclass(frozen=True, kw_only=True)
class ObjectFinder:
    """Finds objects.

    Attributes:
        network: the detector, on its device, with the options it is to run with.
        names: of its classes.
        device: torch's name of the device.
    """

    network: Any
    names: Sequence[str]
    device: str

    def find(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Return the objects in an image, the likeliest first."""
        pixels = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True).to(self.device)
        found = {name: value.cpu() for name, value in self.network([pixels])[0].items()}
        objects: list[dict[str, Any]] = [
            {"name": self.names[label - 1], "score": score, "box": box}
            for label, score, box in zip(
                found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
            )
        ]
        for entry, mask in zip(objects, found.get("masks", []), strict=False):
            entry["mask"] = encode_mask((mask[0] >= 0.5).numpy())
        if picture is not None:
            from lightspine.evaluation.draw import draw_detections

            draw_detections(image, found, self.names, picture, least_score=0.0)
        return DensePrediction(path=path, objects=objects, picture=picture)


@dataclass(frozen=True, kw_only=True)
class ClassFinder:
    """Finds the class of each pixel.

    Attributes:
        network: the segmenter, on its device.
        names: of its classes.
        device: torch's name of the device.
        saved: what its file says of it.
        settings: the file's, with what was asked for in place of its own.
        test: how it looks at an image.
        labels: write label maps beside the pictures.
    """

    network: Any
    names: Sequence[str]
    device: str
    saved: SavedNetwork
    settings: dict[str, Any]
    test: SegmentationTest
    labels: bool

    def find(self, image: Image.Image, path: Path, picture: Path | None) -> DensePrediction:
        """Return the shares of the classes in an image, the largest first."""
        nothing = tv_tensors.Mask(torch.zeros(image.height, image.width, dtype=torch.uint8))
        prepare = eval_transform(self.saved, self.settings)
        pixels, _ = prepare(tv_tensors.Image(F.pil_to_tensor(image)), nothing)
        size = image.height, image.width
        classes = self.test.classify(self.network, pixels.to(self.device), size).cpu()
        counts = torch.bincount(classes.flatten(), minlength=len(self.names))
        order = counts.argsort(descending=True).tolist()
        shares = {
            self.names[number]: int(counts[number]) / classes.numel() for number in order if counts[number]
        }
        if picture is not None:
            from lightspine.evaluation.draw import draw_classes

            draw_classes(image, classes.numpy(), self.names, picture)
            if self.labels:
                with atomic_write(picture.with_name(f"{picture.stem}_labels.png")) as file:
                    Image.fromarray(classes.numpy().astype(np.uint8)).save(file, format="PNG")
        return DensePrediction(path=path, shares=shares, picture=picture)
