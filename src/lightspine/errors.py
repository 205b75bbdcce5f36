"""The two kinds of error that a user can cause or meet; the command line turns them into one sentence.

They live in `lightspine_runtime`, which works without PyTorch and raises them too.
"""

from lightspine_runtime.errors import LightspineError as LightspineError
from lightspine_runtime.errors import UsageError as UsageError

__all__ = ["LightspineError", "UsageError"]
