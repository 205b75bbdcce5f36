"""Run exported models; see `lightspine_runtime`, which does so without PyTorch, and which this re-exports.

`lightspine.runtime.network` makes an exported file a PyTorch module, for what takes one.
"""

from lightspine_runtime import ClassScore as ClassScore
from lightspine_runtime import OnnxModel as OnnxModel
from lightspine_runtime import Prediction as Prediction
from lightspine_runtime import Preparation as Preparation
from lightspine_runtime import keep_freed_memory as keep_freed_memory
from lightspine_runtime import predict as predict

__all__ = ["ClassScore", "OnnxModel", "Prediction", "Preparation", "keep_freed_memory", "predict"]
