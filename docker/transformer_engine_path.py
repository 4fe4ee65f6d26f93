"""Transformer Engine is on the path where the driver's library is. Without that it cannot be loaded, and both
Megatron-Core and SGLang stop where they find one that cannot: the same image would not run on a CPU.

Python imports this module at every start, by a .pth file beside it.
"""

import ctypes
import site
from pathlib import Path

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    pass
else:
    site.addsitedir(str(Path(__file__).parent / "transformer-engine"))
