"""``python -m vkd_kernels.info [--json]``: what this installation is and can do (_info.py collects it)."""

import sys

from ._info import info, main

if __name__ == "__main__":
    main()
else:  # `vkd_kernels.info` stays the function where this module is imported; importlib still finds the module
    info.__spec__ = __spec__  # type: ignore[attr-defined]
    sys.modules[__name__] = info  # type: ignore[assignment]
