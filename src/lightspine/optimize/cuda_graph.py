"""CUDA graph of the forward pass at one input shape, which replaces hundreds of kernel launches by one."""

import threading
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightspine.errors import UsageError
from lightspine.ops.triton.constants import collect_constants

# The first passes compile kernels and choose algorithms, which cannot be captured.
_WARM_UP_PASSES = 3


class CudaGraphModel(nn.Module):
    """Model whose forward pass for the shape of an example is captured into a CUDA graph.

    The graph reads the images from a buffer of its own and writes to others: a call copies its input in,
    replays the graph on the current stream and returns copies of the outputs. Calls from several threads and
    streams run one after the other. There are no gradients.

    Args:
        model: the model, in evaluation mode and on a CUDA device.
        example: images of the shape, dtype and device of all calls; the values are of no importance.

    Attributes:
        model: the model itself, for other shapes and for `forward_features` and so on. Weights that are
            changed in place, as by `load_state_dict`, take effect in the graph too.

    Raises:
        UsageError: the model or the example is not on a CUDA device, or they are on two.
    """

    def __init__(self, model: nn.Module, example: Tensor):
        super().__init__()
        check_capture(model, example)
        self.model = model
        self._lock = threading.Lock()
        self._graph = torch.cuda.CUDAGraph()
        # The buffers may be written outside of inference mode.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(example.device):
            self._input = example.clone(memory_format=torch.preserve_format)
            # A stream of this device. That of `torch.cuda.graph` is on the device of the first graph of the
            # process.
            stream = torch.cuda.Stream()
            with collect_constants() as self._constants:
                self._warm_up(stream)
                # Other threads may allocate memory meanwhile, as those of a data loader do.
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._outputs = self.model(self._input)
            self._finished = torch.cuda.Event()
            self._finished.record()

    def _warm_up(self, stream: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_PASSES):
                self.model(self._input)
        current.wait_stream(stream)

    def forward(self, x: Tensor) -> Any:
        """Return the output of the model for images of the captured shape, dtype and device.

        Raises:
            UsageError: another shape, dtype or device, or images that require gradients.
        """
        if (x.shape, x.dtype, x.device) != (self._input.shape, self._input.dtype, self._input.device):
            raise UsageError(
                f"this CUDA graph takes images of {_describe(self._input)}, received {_describe(x)}: "
                "call the attribute `model` with others"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise UsageError("a CUDA graph computes no gradients: call the attribute `model` instead")
        with self._lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            # The call before may run on another stream, and uses the same buffers.
            stream.wait_event(self._finished)
            self._input.copy_(x)
            self._graph.replay()
            outputs = tree_map_only(Tensor, Tensor.clone, self._outputs)
            self._finished.record(stream)
        return outputs

    def train(self, mode: bool = True) -> "CudaGraphModel":
        """Set evaluation mode, the only one.

        Raises:
            UsageError: training mode.
        """
        if mode:
            raise UsageError("a CUDA graph is captured for inference: train the model before it is optimized")
        return super().train(mode)

    def _apply(self, *_: Any, **__: Any) -> Any:
        raise UsageError(
            "a CUDA graph keeps the device and dtype that it was captured with: convert the model before"
        )

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse to be copied or pickled.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a CUDA graph cannot be copied or saved: copy or save the model, and capture it anew"
        )


def check_capture(model: nn.Module, example: Tensor | None) -> None:
    """Check that the forward pass of a model can be captured.

    Raises:
        UsageError: there is no example, or the model or the example is not on a CUDA device.
    """
    if example is None:
        raise UsageError(
            "cuda_graph=True needs an example of the images: optimize(model, example, cuda_graph=True)"
        )
    for what, tensor in (("a model", next(model.parameters(), example)), ("an example", example)):
        if not tensor.is_cuda:
            raise UsageError(f"a CUDA graph needs {what} on a CUDA device, this one is on {tensor.device}")
    if (device := next(model.parameters(), example).device) != example.device:
        raise UsageError(
            f"a CUDA graph needs model and example on one device, received {device} and {example.device}"
        )


def _describe(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}, on {x.device}"
