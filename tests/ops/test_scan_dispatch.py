"""Backend dispatch by device and requested backend."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from lightspine.blocks import VimMixer
from lightspine.errors import UsageError
from lightspine.ops import dispatch
from lightspine.ops.cross_scan import cross_scan
from lightspine.ops.dispatch import BACKENDS, available_backends, choose_backend, is_exporting
from lightspine.ops.selective_scan import selective_scan
from support.scans import cross_inputs, scan_inputs

F32 = torch.float32


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    # The tests change the available backends, which are cached per process.
    dispatch._choose_backend.cache_clear()
    yield
    dispatch._choose_backend.cache_clear()


@pytest.mark.parametrize(
    ("device", "exporting", "requested", "expected"),
    [
        ("cpu", False, "auto", "cpu"),
        ("cpu", True, "auto", "torch"),
        ("cuda", False, "auto", "triton"),
        ("cuda", True, "auto", "torch"),
        ("mps", False, "auto", "torch"),
        ("meta", False, "auto", "torch"),
        ("cpu", False, "reference", "reference"),
        ("mps", False, "torch", "torch"),
        ("cpu", True, "reference", "reference"),
        ("cpu", False, "cpu", "cpu"),
    ],
)
def test_backend_by_device_and_request(device: str, exporting: bool, requested: str, expected: str) -> None:
    assert choose_backend(device, F32, exporting, requested) == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_backend_for_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="float16, bfloat16, float32, float64, received"):
        choose_backend("cpu", dtype)


def test_cpu_backend_for_another_device_is_refused() -> None:
    with pytest.raises(UsageError, match="'cpu' cannot run here: its tensors are on cuda"):
        choose_backend("cuda", F32, requested="cpu")


def test_cpu_backend_in_an_exported_format_is_refused() -> None:
    with pytest.raises(UsageError, match="the exported format has no kernels"):
        choose_backend("cpu", F32, exporting=True, requested="cpu")


def test_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not available_backends()["cpu"][0]
    with pytest.raises(UsageError, match="'cpu' cannot run here: numba is not installed"):
        choose_backend("cpu", F32, requested="cpu")


def test_automatic_backend_for_cuda_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert available_backends()["triton"] == (False, "triton is not installed")
    with pytest.raises(UsageError, match="'triton', but triton is not installed"):
        choose_backend("cuda", F32)


def test_triton_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="'triton' cannot run here: no CUDA device"):
        choose_backend("cpu", F32, requested="triton")


def test_triton_on_cpu_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UsageError, match="'triton' cannot run here: its tensors are on cpu"):
        choose_backend("cpu", F32, requested="triton")


def test_interpreted_triton_takes_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("cpu", F32, requested="triton") == "triton"
    assert choose_backend("cpu", F32) == "cpu"


def test_available_backends_say_where_they_run_or_why_not() -> None:
    report = available_backends()
    assert tuple(report) == BACKENDS
    assert report["reference"][0]
    assert report["torch"][0]
    assert all(reason for _, reason in report.values())


def test_automatic_backend_runs_on_meta_tensors() -> None:
    u, delta, A, B, C, *_ = (t.to("meta") for t in scan_inputs())
    assert selective_scan(u, delta, A, B, C).shape == u.shape
    x, delta, A, B, C, *_ = (t.to("meta") for t in cross_inputs())
    assert cross_scan(x, delta, A, B, C).shape == x.shape


class _Probe(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if is_exporting() else x - 1


def test_compiler_takes_the_branch_of_eager_mode_and_not_that_of_an_export() -> None:
    zero = torch.zeros(())
    assert torch.compile(_Probe(), backend="eager", fullgraph=True)(zero) == _Probe()(zero) == -1


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_its_own_branch(strict: bool) -> None:
    zero = torch.zeros(())
    assert torch.export.export(_Probe(), (zero,), strict=strict).module()(zero) == 1


def test_compiled_mixer_of_vim_scans_both_directions_at_once_where_kernels_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(dispatch._KERNELS_BY_DEVICE, "cpu", "triton")
    operators: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        # The kernels do not run on a CPU.
        return lambda *_: (torch.zeros(1, 16, 2, 2),)

    with torch.no_grad():
        torch.compile(VimMixer(16), backend=record, fullgraph=True)(torch.zeros(1, 16, 2, 2))
    assert [name for name in operators if "lightspine" in name] == [
        "lightspine.causal_conv1d",
        "lightspine.bidirectional_scan",
    ]
