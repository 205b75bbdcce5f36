"""Drop-in for mamba_ssm, causal_conv1d and VMamba's CUDA extensions on lightspine's scan, on any device.

`install()` makes code that imports those packages run without them, forward and backward:

    import lightspine.compat

    lightspine.compat.install()
    from mamba_ssm import Mamba

`python -m lightspine.compat SCRIPT.py ARGS` does that before it runs a script. Nothing happens at
`import lightspine`; `uninstall()` undoes `install()`.
"""

from lightspine.compat.install import Replacement as Replacement
from lightspine.compat.install import install as install
from lightspine.compat.install import uninstall as uninstall

__all__ = ["Replacement", "install", "uninstall"]
