"""Deprecated name of `lightspine.training`; it will be removed in the next release."""

import sys
import warnings

from lightspine.training import base, classification, cli, detection, fit, segmentation

warnings.warn(
    "lightspine.tasks is deprecated and will be removed in the next release: use lightspine.training",
    FutureWarning,
    stacklevel=2,
)

results = fit
# `import lightspine.tasks.fit` finds these entries after it has imported `lightspine.tasks`.
for _name, _module in {
    "base": base,
    "classification": classification,
    "cli": cli,
    "detection": detection,
    "fit": fit,
    "results": results,
    "segmentation": segmentation,
}.items():
    sys.modules[f"{__name__}.{_name}"] = _module
