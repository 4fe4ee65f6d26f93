"""Routes: the experts that a mixture's routers chose for a token, k in each layer.

Routes of T tokens are uint8 or uint16 [T, layers, k]; a layer without experts has a row too. The largest
value of the dtype, in all places, stands for a token without a route: nothing has read it as context yet, as
is so of a trajectory's last token. Whoever replays routes lets the router choose for such a token.

The route of a token is that of the first request that read it as context: its own request, but for a
request's last token, which the first continuation reads. It keeps this route, whatever a later request that
finds the token no longer cached would choose.
"""

import numpy as np


def dtype_for(experts: int) -> type[np.uint8] | type[np.uint16]:
    """The dtype of routes among this many experts."""
    return np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16


def no_route(dtype: np.dtype | type[np.unsignedinteger]) -> int:
    """The value that stands for no route."""
    return int(np.iinfo(dtype).max)
