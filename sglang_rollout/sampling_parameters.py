"""A request's sampling, in SGLang's words."""

from typing import Any

from treepo.protocols import GenerateRequest

_ALL_TOKENS = -1


def sampling_parameters(request: GenerateRequest) -> dict[str, Any]:
    """All of them are named, because a server may have defaults of its own."""
    return {
        "max_new_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": _ALL_TOKENS if request.top_k is None else request.top_k,
        "min_p": request.min_p,
        "sampling_seed": request.seed,
    }
