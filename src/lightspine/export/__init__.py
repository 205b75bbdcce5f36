"""Export of models to ONNX, `torch.export` and Core ML.

`import lightspine` imports this package; onnx and onnxruntime are imported only by an export.
"""

from lightspine.export.onnx_file import export_onnx as export_onnx
from lightspine.export.verification import ExportReport as ExportReport
from lightspine.optimize import optimize as optimize

__all__ = ["ExportReport", "export_onnx", "optimize"]
