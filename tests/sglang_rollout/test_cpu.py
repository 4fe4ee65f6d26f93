"""The arithmetic of the CPU platform: padded attention and seeded draws, compared with naive versions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_rollout.cpu.padded_attention import Steps, attend, plan
from sglang_rollout.cpu.seeded_draw import invert, truncate, uniform
from sglang_rollout.cpu.unpinned import Unpinned

HEADS, KV_HEADS, WIDTH, POOL = 6, 2, 8, 4000


def naive(query: Tensor, keys: Tensor, values: Tensor, new: int, scale: float) -> Tensor:
    """One request, one head and one query at a time: [new, heads, width] on [total, kv_heads, width]."""
    out = torch.empty_like(query)
    total = len(keys)
    for i in range(new):
        seen = total - new + i + 1
        for head in range(HEADS):
            shared = head * KV_HEADS // HEADS
            weights = (keys[:seen, shared] @ query[i, head] * scale).softmax(0)
            out[i, head] = weights @ values[:seen, shared]
    return out


def hard_batches(rng: np.random.Generator) -> list[list[tuple[int, int]]]:
    """(new, total) of each request: decoding, continuations of cached prefixes, whole prompts, all mixed."""
    lengths = [int(n) for n in rng.integers(1, 120, size=9)]
    decode = [(1, length) for length in lengths]
    whole = [(length, length) for length in lengths]
    mixed = [(int(rng.integers(1, length + 1)), length) for length in lengths]
    return [[(1, 1)], [(40, 40)], [(17, 90)], decode, whole, mixed, [*decode, *mixed, (60, 61), (1, 300)]]


@pytest.mark.parametrize("token_bytes", [1, 1 << 13, 1 << 30])
def test_attention_agrees_with_a_naive_loop(token_bytes: int) -> None:
    """For calls that hold all requests, some of them, or one."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    keys, values = torch.randn(2, POOL, KV_HEADS, WIDTH, dtype=torch.float64)
    for batch in hard_batches(rng):
        new, total = [n for n, _ in batch], [t for _, t in batch]
        free = iter(rng.permutation(POOL))
        # Slots beyond a request's own hold values of other requests.
        slots = torch.from_numpy(rng.integers(0, POOL, size=(len(batch), max(total) + 3))).int()
        for row, length in enumerate(total):
            slots[row, :length] = torch.tensor([next(free) for _ in range(length)])
        query = torch.randn(sum(new), HEADS, WIDTH, dtype=torch.float64)
        output = torch.full_like(query, torch.nan)
        calls = plan(new, total, slots, token_bytes, torch.float64)
        attend(calls, query, keys, values, 0.3, output)
        own = [slots[row, :length].long() for row, length in enumerate(total)]
        expected = torch.cat(
            [
                naive(part, keys[places], values[places], count, 0.3)
                for part, places, count in zip(query.split(new), own, new, strict=True)
            ]
        )
        # float64: the same sums in another order.
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


def test_attention_does_not_read_slots_of_other_requests() -> None:
    """The content of another request's slot, even a NaN, must not matter."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, POOL, KV_HEADS, WIDTH)
    slots = torch.arange(24).view(2, 12).int()
    for pool in (keys, values):
        pool[5:12] = torch.nan  # beyond the first request's 5 tokens
    output = torch.empty(2, HEADS, WIDTH)
    attend(
        plan([1, 1], [5, 7], slots, 1, torch.float32), torch.randn(2, HEADS, WIDTH), keys, values, 1.0, output
    )
    assert output.isfinite().all()


def test_calls_hold_every_request_once_within_the_bounds_of_size_and_padding() -> None:
    rng = np.random.default_rng(1)
    total = [int(n) for n in rng.integers(1, 3000, size=100)]
    slots = torch.zeros(100, 3000, dtype=torch.int32)
    for token_bytes in (1, 1 << 8, 1 << 10):
        calls = [
            call
            for call in plan([1] * 100, total, slots, token_bytes, torch.float32)
            if isinstance(call, Steps)
        ]
        assert sorted(int(row) for call in calls for row in call.rows) == list(range(100))
        assert all(len(call.rows) == 1 or call.slots.numel() * token_bytes <= 1 << 20 for call in calls)
        assert sum(call.slots.numel() for call in calls) <= 2 * sum(total)


def test_uniform_numbers_depend_on_seed_and_position_and_are_uniform() -> None:
    seed, position = (axis.ravel() for axis in np.meshgrid(np.arange(300), np.arange(300)))
    numbers = uniform(seed, position)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == len(numbers)
    np.testing.assert_array_equal(numbers[:50], uniform(seed[:50], position[:50]))
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    # Chi-square with 99 degrees of freedom: its mean is 99, its standard deviation 14.
    assert ((counts - 900) ** 2 / 900).sum() < 99 + 5 * 14
    grid = numbers.reshape(300, 300)
    for one, next_one in [(grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])]:
        # The correlation of some 90 000 independent pairs has a standard deviation of 1/300.
        assert abs(np.corrcoef(one.ravel(), next_one.ravel())[0, 1]) < 5 / 300


def test_inverting_the_distribution_gives_each_token_its_share_and_never_an_impossible_one() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = invert(probs.expand(4000, -1), grid)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 1000, 0, 2000, 1000, 0]
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert invert(probs.expand(2, -1), edges).tolist() == [1, 4]


def test_a_row_that_is_not_a_distribution_gives_some_token() -> None:
    rows = torch.tensor([[torch.nan] * 4, [0.0, 0.0, 0.0, 1.0]])
    drawn = invert(rows, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert 0 <= int(drawn[0]) < 4
    assert int(drawn[1]) == 3


def test_each_row_keeps_the_tokens_that_its_own_rule_keeps() -> None:
    likely = torch.tensor([0.1, 0.4, 0.2, 0.3])
    rules = [  # top_k, top_p, min_p, tokens that stay
        (1 << 30, 1.0, 0.0, [0, 1, 2, 3]),
        (2, 1.0, 0.0, [1, 3]),
        (1, 1.0, 0.0, [1]),
        (1 << 30, 0.3, 0.0, [1]),
        (1 << 30, 0.5, 0.0, [1, 3]),
        (1 << 30, 0.75, 0.0, [1, 2, 3]),
        (1 << 30, 1.0, 0.6, [1, 3]),
        (3, 0.95, 0.3, [1, 2, 3]),
        (2, 0.95, 0.9, [1]),
    ]
    probs = likely.expand(len(rules), -1).clone()
    top_k, top_p, min_p = (torch.tensor([rule[i] for rule in rules]) for i in range(3))
    kept = truncate(probs, top_k, top_p, min_p)
    for row, (*_, stays) in zip(kept, rules, strict=True):
        assert row.nonzero()[:, 0].tolist() == stays
        assert row[stays].tolist() == likely[stays].tolist()
    assert torch.equal(probs, likely.expand(len(rules), -1)), "log-probs are computed from it afterwards"


def test_rounding_leaves_out_no_token_of_a_whole_distribution() -> None:
    probs = torch.full((1, 100_000), 1.0001e-5)  # float32 sums it up to more than 1
    whole = truncate(probs, torch.tensor([1 << 30]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert torch.equal(whole, probs)


def test_memory_is_not_pinned_where_there_is_no_gpu() -> None:
    with Unpinned():
        made = torch.tensor([1, 2], dtype=torch.int32, pin_memory=True)
        zeros = torch.zeros((2, 3), pin_memory=True, dtype=torch.float64)
        pinned = made.pin_memory()
    assert pinned is made
    assert made.tolist() == [1, 2]
    assert made.dtype == torch.int32
    assert zeros.dtype == torch.float64
