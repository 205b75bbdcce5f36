"""Warnings of other libraries that a run hides."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightspine.training.log_filters import filter_lightning_logs


def test_first_step_that_a_gradient_scaler_skips_is_no_warning() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    scheduler = LambdaLR(optimizer, lambda _: 0.5)
    with filter_lightning_logs():
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
