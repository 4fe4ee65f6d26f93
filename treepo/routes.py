"""Routes: the experts that a mixture's routers chose for a token, k in each layer.

Routes of T tokens are uint8 or uint16 [T, layers, k]; a layer without experts has a row too. The largest
value of the dtype, in all places, stands for a token without a route, one that nothing has read as context:
a trajectory's last token, for example. In replay the router chooses for such a token.

The route of a token is that of the first request that read it as context: its own request, but for a
request's last token, which the first continuation reads. It keeps this route, whatever a later request that
finds the token no longer cached would choose.
"""

import base64
import math
from typing import Annotated, Literal, TypedDict

import numpy as np
from pydantic import Field, PositiveInt


def dtype_for(experts: int) -> type[np.uint8] | type[np.uint16]:
    """The dtype of routes among this many experts."""
    return np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16


def no_route(dtype: np.dtype | type[np.unsignedinteger]) -> int:
    """The value that stands for no route."""
    return int(np.iinfo(dtype).max)


def has_route(routes: np.ndarray) -> np.ndarray:
    """Whether each token of `routes` ([..., layers, k]) has a route: bool [...]."""
    return routes[..., 0, 0] != no_route(routes.dtype)


def routes_of_piece(routes: np.ndarray, piece: slice) -> np.ndarray:
    """The routes of a piece of an engine's tokens, in an array of their own.

    routes: of the context's last token and of the engine's tokens but the last, which has none.
    """
    rows = routes[piece.start + 1 : piece.stop + 1]
    missing = piece.stop - piece.start - len(rows)
    none = np.full((missing, *routes.shape[1:]), no_route(routes.dtype), dtype=routes.dtype)
    return np.concatenate([rows, none])


def fault_of_routes(routes: np.ndarray | None, tokens: int, like: np.ndarray | None) -> str | None:
    """What is wrong with the routes of `tokens` tokens of a tree; None if nothing is.

    like: other routes of the tree, None if it has none.
    """
    if routes is None or like is None:
        return None if routes is like else "only some tokens with routes"
    if routes.dtype not in (np.uint8, np.uint16) or routes.ndim != 3 or not routes.size:
        return f"routes of type {routes.dtype} and shape {routes.shape}"
    if len(routes) != tokens:
        return f"{tokens} tokens and the routes of {len(routes)}"
    if routes.dtype != like.dtype or routes.shape[1:] != like.shape[1:]:
        return f"routes of {routes.dtype} {routes.shape[1:]}, and others of {like.dtype} {like.shape[1:]}"
    return None


class RoutesRecord(TypedDict):
    """Routes in JSON. shape: tokens, layers, k. base64: of the array's bytes, little-endian."""

    dtype: Literal["uint8", "uint16"]
    shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    base64: str


def to_record(routes: np.ndarray) -> RoutesRecord:
    """Routes as they stand in a line of JSON."""
    little = routes.astype(routes.dtype.newbyteorder("<"), copy=False)
    return {
        "dtype": "uint8" if routes.dtype == np.uint8 else "uint16",
        "shape": list(routes.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def from_record(record: RoutesRecord) -> np.ndarray:
    """The routes of a record. Raises ValueError if its text is not base64 of as many bytes as it says."""
    content = base64.b64decode(record["base64"], validate=True)
    dtype, shape = np.dtype(record["dtype"]), record["shape"]
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"routes of shape {shape} in {dtype} have {len(content)} bytes")
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype).reshape(shape)
