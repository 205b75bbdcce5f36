"""Inference forms of models: `optimize` returns an equivalent model that runs faster.

`general` optimizes any model. The other modules register faster forms for the blocks of one family each. To
add one, write a module here that calls `register_inference_form`; a family of another package calls it in its
own module.
"""

import importlib
import pkgutil

from lightspine.optimize.cuda_graph import CudaGraphModel as CudaGraphModel
from lightspine.optimize.general import optimize as optimize
from lightspine.optimize.general import register_inference_form as register_inference_form

__all__ = ["CudaGraphModel", "optimize", "register_inference_form"]

# Importing every module here registers the forms of all families, so that a new one needs no entry in a list.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
