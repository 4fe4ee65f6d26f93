"""Put Transformer Engine on Python's path if the driver's library is there.

Without the driver Transformer Engine cannot be loaded, and Megatron-Core and SGLang stop at one that cannot:
the same image would not run on a CPU. Python imports this module at every start, through the .pth file beside
it.
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
