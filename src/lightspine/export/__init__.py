"""Models for use elsewhere: inference copies, and files that run without this library.

`import lightspine` imports this for `optimize`; what needs onnx is imported when it is called.
"""

from lightspine.export.onnx_file import ExportReport as ExportReport
from lightspine.export.onnx_file import export_onnx as export_onnx
from lightspine.optimize import optimize as optimize

__all__ = ["ExportReport", "export_onnx", "optimize"]
