"""Compiles functions of plain torch operations into one kernel each, on CUDA."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def fused[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled on CUDA. On a CPU compiling takes longer than it saves."""
    return compiled(function) if torch.cuda.is_available() else function


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first length of a dimension is compiled as a constant, later ones as a variable. A graph break is
    an error.
    """
    return torch.compile(function, fullgraph=True)
