"""Run models that `lightspine export` wrote, with ONNX Runtime, NumPy and Pillow only.

This package imports neither PyTorch nor lightspine, and `pip install ./runtime` installs it alone.
"""

from lightspine_runtime._version import __version__ as __version__
from lightspine_runtime.detection import Detections as Detections
from lightspine_runtime.detection import DetectionSettings as DetectionSettings
from lightspine_runtime.detection import draw_detections as draw_detections
from lightspine_runtime.errors import LightspineError as LightspineError
from lightspine_runtime.errors import UsageError as UsageError
from lightspine_runtime.model import ClassScore as ClassScore
from lightspine_runtime.model import OnnxModel as OnnxModel
from lightspine_runtime.model import Prediction as Prediction
from lightspine_runtime.model import predict as predict
from lightspine_runtime.preprocessing import Preprocessing as Preprocessing

__all__ = [
    "ClassScore",
    "DetectionSettings",
    "Detections",
    "LightspineError",
    "OnnxModel",
    "Prediction",
    "Preprocessing",
    "UsageError",
    "__version__",
    "draw_detections",
    "predict",
]
