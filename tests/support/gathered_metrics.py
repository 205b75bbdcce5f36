"""Compute metrics on two ranks that share one image, and write the results as JSON.

`torchrun --nproc-per-node 2 -m support.gathered_metrics FOLDER` in `tests/`; FOLDER has a small COCO file.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightspine.data.detection import read_coco
from lightspine.dense.metrics import CocoMetrics, SegmentationMetrics

LABELS = torch.arange(3 * 8 * 8).reshape(3, 8, 8) % 3


def main() -> None:
    """Write `FOLDER/RANK.json`."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    shared = (0, 1) if rank == 0 else (1, 2)
    pixels = SegmentationMetrics(["a", "b", "c"])
    boxes = CocoMetrics(read_coco(folder / "objects.json", folder), max_detections=10)
    for number in shared:
        # The second rank's result of the shared image is ignored.
        wrong = number == 1 and rank == 1
        found = (LABELS[number] + wrong) % 3
        pixels.update([str(number)], [found], [LABELS[number]])
        target = {"boxes": torch.tensor([[10.0, 10, 30, 30 - 10 * wrong]]), "labels": torch.tensor([2])}
        boxes.update([number + 1], [target | {"scores": torch.ones(1), "masks": torch.ones(1, 48, 64)}])
    pixels.all_gather()
    boxes.all_gather()
    report = {
        "images": [pixels.num_images, boxes.num_images],
        "pixels": int(pixels.confusion().sum()),
        "mIoU": pixels.compute()["mIoU"],
        "AP": boxes.compute()["box"]["AP"],
        "results": len(boxes.results()),
    }
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
