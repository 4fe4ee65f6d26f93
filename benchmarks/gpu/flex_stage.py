"""The stage of first_day.py that compares FlexAttention, which attends along trees, with dense attention."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.stage_process import Context, Figures
from benchmarks.gpu.timing import median_seconds, synchronize
from megatron_bridge.attention import attend, plan_attention
from megatron_bridge.rotary import rotate

MOST_COMPILATIONS = 6
# Relative errors (norm over norm). bfloat16 rounds to 1/256; a kernel's few roundings of probabilities and
# outputs leave less than these. Gradients pass twice as many.
OUTPUT_ERROR, GRADIENT_ERROR = 1e-2, 2e-2

_CUDA = torch.cuda.is_available()
_DEVICE = torch.device("cuda" if _CUDA else "cpu")


def flex(context: Context) -> Figures:
    """Tree attention in bfloat16, forward and backward, against dense attention in float32."""
    lengths = [1, 70, 300, 33, 257] if context.dry_run else [1, 700, 16384, 129, 2048, 5000, 8191, 12000]
    heads, kv_heads, width = (4, 2, 16) if context.dry_run else (14, 2, 64)
    dtype = torch.bfloat16 if _CUDA else torch.float32
    torch._dynamo.reset()
    counters.clear()
    errors: dict[str, dict[str, float]] = {}
    milliseconds: dict[str, float] = {}
    first_seconds: dict[str, float] = {}
    for length in lengths:
        exit_T, position_T = _random_tree(length)
        frequency = 10000.0 ** -(torch.arange(0, width, 2, device=_DEVICE) / width)
        exits, positions = (torch.tensor(array, device=_DEVICE) for array in (exit_T, position_T))
        plan = plan_attention(exits, positions, frequency, dtype)
        inputs = [
            torch.randn(length, count, width, device=_DEVICE, dtype=dtype, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        ]
        weight = torch.randn(length, heads, width, device=_DEVICE, dtype=dtype)

        def step(inputs: Sequence[Tensor], run: Callable[..., Tensor], weight: Tensor) -> list[Tensor]:
            output = run(*inputs)
            return [output, *torch.autograd.grad(output, inputs, weight)]

        start = time.perf_counter()
        found = step(inputs, partial(attend, plan=plan), weight)
        synchronize()
        first_seconds[str(length)] = time.perf_counter() - start
        exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
        dense = partial(_dense, exit_T=exits, cos=plan.cos, sin=plan.sin)
        expected = step(exact_inputs, dense, weight.float())
        names = ("output", "query", "key", "value")
        errors[str(length)] = {
            name: _relative(mine, his, weight) for name, mine, his in zip(names, found, expected, strict=True)
        }
        del expected, exact_inputs
        milliseconds[str(length)] = 1e3 * median_seconds(
            partial(step, inputs, partial(attend, plan=plan), weight), repeats=5
        )
    compilations = counters["stats"]["unique_graphs"]
    assert compilations <= MOST_COMPILATIONS, f"{compilations} compilations for lengths {lengths}"
    for length, of_length in errors.items():
        assert of_length["output"] < OUTPUT_ERROR, (length, of_length)
        assert max(of_length.values()) < GRADIENT_ERROR, (length, of_length)
    longest = str(max(lengths))
    return {
        "headline": (
            f"forward and backward of {longest} tokens {milliseconds[longest]:.2f} ms, {compilations} "
            f"compilations of {sum(first_seconds.values()):.1f} s, errors at most "
            f"{max(max(of_length.values()) for of_length in errors.values()):.1e}"
        ),
        "compilations": compilations,
        "first_call_seconds": first_seconds,
        "milliseconds": milliseconds,
        "relative_errors": errors,
        "heads": [heads, kv_heads, width],
    }


def _random_tree(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Exit and position of every token of a random depth-first tree with segments of about an eighth."""
    rng = np.random.default_rng(length)
    exit_T, position_T = np.full(length, length), np.zeros(length, dtype=np.int64)

    def grow(start: int, end: int, depth: int) -> None:
        stem = end - start if end - start < 8 else int(rng.integers(1, max(2, (end - start) // 4)))
        exit_T[start : start + stem] = end
        position_T[start : start + stem] = depth + np.arange(stem)
        if start + stem == end:
            return
        cuts = np.sort(rng.integers(start + stem, end, 2))
        for left, right in zip([start + stem, *cuts], [*cuts, end], strict=True):
            if left < right:
                grow(int(left), int(right), depth + stem)

    grow(0, length, 0)
    return exit_T, position_T


def _dense(query: Tensor, key: Tensor, value: Tensor, exit_T: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention by the definition of the mask: key <= query < exit[key]."""
    index = torch.arange(len(exit_T), device=query.device)
    allowed = (index[None, :] <= index[:, None]) & (index[:, None] < exit_T[None, :])
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    heads = []
    for head in range(query.shape[1]):  # one by one: all heads' weights at once would fill the card
        parts = (x[None, None, :, head] for x in (query, key, value))
        heads.append(scaled_dot_product_attention(*parts, attn_mask=allowed[None, None])[0, 0])
    return torch.stack(heads, dim=1)


def _relative(found: Tensor, expected: Tensor, weight: Tensor) -> float:
    """weight: the gradient of the output; those of query and key vanish if a token sees itself alone."""
    norm = torch.maximum(expected.float().norm(), 0.01 * weight.float().norm())
    return float((found.float() - expected.float()).norm() / norm)
