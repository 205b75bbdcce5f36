"""What models import from `mamba_ssm.utils`: the cache of `inference_params` and files of the Hub."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.models.weights import hub_download


@dataclass
class InferenceParams:
    """Cache of the states of `Mamba` modules between calls.

    Attributes:
        max_seqlen: longest sequence.
        max_batch_size: largest batch.
        seqlen_offset: number of tokens so far; 0 for the first call.
        batch_size_offset: first row of the batch.
        key_value_memory_dict: states of the layers by `layer_idx`.
        lengths_per_sample: number of tokens of each sequence, (B,).
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Reset the sequence position; the cached states are kept."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class GenerationMixin:
    """Base class of mamba_ssm's language models, from which vision models inherit without using it."""

    def generate(self, *_: Any, **__: Any) -> Any:
        """Raise an error: lightspine generates no text.

        Raises:
            UsageError: always.
        """
        raise UsageError("lightspine.compat has vision modules only: text generation needs mamba_ssm itself")


def load_config_hf(model_name: str) -> Any:
    """Load `config.json` from a local folder or a Hugging Face Hub repository."""
    return json.loads(_find_file(model_name, "config.json").read_text())


def load_state_dict_hf(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Load the state dict `pytorch_model.bin` from a local folder or a Hugging Face Hub repository.

    Only tensors are read from the file; no code in it is run.
    """
    path = _find_file(model_name, "pytorch_model.bin")
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {
        name: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
        for name, t in weights.items()
    }


def _find_file(model_name: str, file: str) -> Path:
    return Path(model_name) / file if Path(model_name).is_dir() else hub_download(model_name, file)
