"""Models of benchmark rows in their mode and dtype."""

import torch

from lightspine.benchmark.model_specs import parse_model
from lightspine.benchmark.prepare import prepare_row
from lightspine.benchmark.settings import BenchSettings, plan_groups


def test_optimized_model_in_half_precision_keeps_the_parameters_of_its_scans() -> None:
    settings = BenchSettings(sizes=((64, 64),), modes=("optimized",), dtypes=("bfloat16",))
    [[job]] = plan_groups([parse_model("vim_tiny")], settings)
    model = prepare_row(job, None, train=False).model
    assert model is not None
    found = {buffer.dtype for name, buffer in model.named_buffers() if name.endswith(".A")}
    assert found == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
