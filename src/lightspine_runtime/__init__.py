"""Run what `lightspine export` wrote with ONNX Runtime, NumPy and Pillow alone: no PyTorch, no timm.

A package of its own beside `lightspine`, whose import loads PyTorch; there it is `lightspine.runtime`.
"""

from lightspine_runtime.allocation import keep_freed_memory as keep_freed_memory
from lightspine_runtime.errors import LightspineError as LightspineError
from lightspine_runtime.errors import UsageError as UsageError
from lightspine_runtime.model import ClassScore as ClassScore
from lightspine_runtime.model import OnnxModel as OnnxModel
from lightspine_runtime.model import Prediction as Prediction
from lightspine_runtime.model import predict as predict
from lightspine_runtime.preprocessing import Preparation as Preparation

__all__ = [
    "ClassScore",
    "LightspineError",
    "OnnxModel",
    "Prediction",
    "Preparation",
    "UsageError",
    "keep_freed_memory",
    "predict",
]
