"""Lets Python look for cyclic garbage rarely while trees grow.

A driver of thousands of trees has millions of objects. By default Python passes over all of them again and
again, which took almost half of the driver's CPU time (docs/performance.md, "A thousand engines"). It finds
nothing, because trees, requests and tasks have no cycles.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = 50_000, 20, 20  # new objects before the youngest are looked at; then multiples of that


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage rarely while the body runs, and pass over no object that was there before it."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
