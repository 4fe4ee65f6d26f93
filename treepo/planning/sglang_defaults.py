"""What SGLang 0.5.16 chooses where the configuration leaves it open (its server_args.py). Units: MiB, tokens.

`mem_fraction_static`: the share of the memory that is free at its start for weights and KV cache. Kept back:
512 + 1.5 a token of a prefill's chunk + 128 a tensor-parallel rank + 2 a request of the largest decoding
graph + 8 a prefill graph, and at least 10240 where the device has more than 60 GiB.
"""

from dataclasses import dataclass

_GIB = 1024


@dataclass(frozen=True, slots=True)
class Defaults:
    """chunk_tokens: of a prefill. memory_fraction: of the device's free memory."""

    chunk_tokens: int
    memory_fraction: float


def defaults(memory: float, tensor: int, graphs: bool) -> Defaults:
    """For a device of `memory` MiB. graphs: whether passes are captured as CUDA graphs."""
    few = tensor < 4
    chunk, batch = next(
        (chunk, batch)
        for bound, chunk, batch in (
            (20 * _GIB, 2048, 8),
            (35 * _GIB, 2048, 24 if few else 80),
            (60 * _GIB, 4096, 32 if few else 160),
            (160 * _GIB, 8192, 256 if few else 512),
            (float("inf"), 16384, 512),
        )
        if memory < bound
    )
    kept = 512 + 1.5 * chunk + 128 * tensor
    if graphs:
        kept += 2 * batch + 8 * _prefill_graphs(chunk)
    if memory > 60 * _GIB:
        kept = max(kept, 10 * _GIB)
    return Defaults(chunk, round((memory - kept) / memory, 3))


def _prefill_graphs(tokens: int) -> int:
    """Sizes of the captured prefills: closer together where they are small."""
    spans = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256))
    sizes = [size for start, stop, step in spans for size in range(start, stop + 1, step)]
    return sum(size <= tokens for size in [*sizes, *range(4608, tokens + 1, 512)])


def most_requests(kv_tokens: int, positions: int) -> int:
    """That run at once, for a model of so many positions."""
    return min(max(min(kv_tokens * 512 // positions, 4096), 2048), kv_tokens // 2)
