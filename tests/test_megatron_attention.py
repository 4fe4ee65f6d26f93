"""Tree attention: the plans agree with the dense mask on random forests."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_bridge import attention
from megatron_bridge.attention import attend, block_mask, plan_attention
from megatron_bridge.rotary import inverse_frequency

CPU = torch.device("cpu")


def random_forest(
    rng: np.random.Generator, nodes: int, longest: int, branching: float
) -> tuple[np.ndarray, np.ndarray]:
    """The exit and position of a forest whose nodes have 1 to `longest` tokens: a node is a child of the one
    before it or, with probability `branching`, of an elder one or of none.
    """
    path: list[int] = []  # tokens up to and with each open node
    opened: list[tuple[int, int]] = []  # start and end of each open node
    closed: list[tuple[int, int, int]] = []
    position: list[int] = []

    def close(depth: int) -> None:
        while len(opened) > depth:
            closed.append((*opened.pop(), len(position)))
            path.pop()

    for _ in range(nodes):
        if rng.random() < branching:
            close(int(rng.integers(0, len(opened) + 1)))
        length = int(rng.integers(1, longest + 1))
        above = path[-1] if path else 0
        opened.append((len(position), len(position) + length))
        path.append(above + length)
        position.extend(range(above, above + length))
    close(0)
    exit_T = np.zeros(len(position), dtype=np.int32)
    for start, stop, subtree_end in closed:
        exit_T[start:stop] = subtree_end
    return exit_T, np.array(position, dtype=np.int32)


FORESTS = {
    "bushy": (120, 9, 0.6),
    "one-token segments": (150, 1, 0.5),
    "long segments": (12, 150, 0.5),
    "a chain": (40, 12, 0.0),
    "one token": (1, 1, 0.0),
    "many tiny trees": (90, 3, 1.0),
}


def frequency(head_dim: int) -> Tensor:
    return inverse_frequency({"rope_theta": 10000.0}, head_dim).double()


def dense(exit_T: np.ndarray) -> Tensor:
    query, key = np.arange(len(exit_T))[:, None], np.arange(len(exit_T))[None]
    return torch.from_numpy((key <= query) & (query < exit_T[None]))


def attend_densely(
    query: Tensor, key: Tensor, value: Tensor, exit_T: np.ndarray, position_T: np.ndarray
) -> Tensor:
    """The definition, with complex numbers for the rotation and every head written out."""
    head_dim = query.shape[-1]
    angle = torch.from_numpy(position_T)[:, None] * frequency(head_dim)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    query, key = rotate(query), rotate(key)
    per_group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        group = head // per_group
        score = (query[:, head] @ key[:, group].T / head_dim**0.5).masked_fill(~dense(exit_T), -torch.inf)
        heads.append(score.softmax(-1) @ value[:, group])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("shape", FORESTS.values(), ids=FORESTS.keys())
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_are_those_of_the_dense_mask(shape, seed) -> None:
    rng = np.random.default_rng(seed)
    exit_T, position_T = random_forest(rng, *shape)
    torch.manual_seed(seed)
    query, key, value = inputs = [
        torch.randn(len(exit_T), heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    ]
    weight = torch.randn(len(exit_T), 4, 6, dtype=torch.float64)
    plan = plan_attention(exit_T, position_T, frequency(6), torch.float64, CPU)
    results = [
        [output, *torch.autograd.grad((output * weight).sum(), inputs)]
        for output in (
            attend(query, key, value, plan),
            attend_densely(query, key, value, exit_T, position_T),
        )
    ]
    for ours, reference in zip(*results, strict=True):
        # The same sums of at most some hundred float64 terms of about 1, in another order.
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


def test_cost_follows_the_allowed_pairs() -> None:
    """Sixteen prompts of eight leaves: far from T^2, and within a small factor of the pairs allowed."""
    rng = np.random.default_rng(0)
    trees = [random_forest(rng, 15, 24, 0.5)[0] for _ in range(16)]
    offset = np.cumsum([0, *map(len, trees[:-1])])
    exit_T = np.concatenate([tree + start for tree, start in zip(trees, offset, strict=True)]).astype(
        np.int32
    )
    cost = sum(group.bias.numel() for group in attention.gather_plan(exit_T, torch.float32).groups)
    allowed = int(dense(exit_T).sum())
    assert cost < 6 * allowed + attention.CPU_BLOCK**2
    assert cost < len(exit_T) ** 2 / 8


def test_queries_past_the_end_leave_gradients_finite() -> None:
    """Five tokens in a block of 64: the empty rows of the rest must not turn into NaN."""
    exit_T = np.array([3, 3, 3, 4, 5], dtype=np.int32)
    position_T = np.array([0, 1, 2, 0, 0], dtype=np.int32)
    plan = plan_attention(exit_T, position_T, frequency(4), torch.float64, CPU)
    query, key, value = (torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    output = attend(query, key, value, plan)
    gradients = torch.autograd.grad(output[:3].sum(), [query, key, value])
    assert all(gradient.isfinite().all() for gradient in (output, *gradients))
    assert (gradients[2][3:] == 0).all()


@pytest.mark.parametrize("shape", FORESTS.values(), ids=FORESTS.keys())
def test_block_mask_has_every_block_with_an_allowed_pair(shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that FlexAttention skips have no allowed pair; blocks that it does not mask have all pairs."""
    monkeypatch.setattr(attention, "CUDA_BLOCK", 16)
    exit_T, _ = random_forest(np.random.default_rng(1), *shape)
    mask = block_mask(torch.from_numpy(exit_T))
    pairs = torch.nn.functional.pad(dense(exit_T), (0, -len(exit_T) % 16, 0, -len(exit_T) % 16))
    blocks = pairs.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2).flatten(2)
    partial = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    full = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for row in range(len(partial)):
        partial[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] = True
        full[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    assert not (partial & full).any()
    assert torch.equal(partial | full, blocks.any(-1))
    assert blocks.all(-1)[full].all()
    assert full.sum() == blocks.all(-1).sum() - blocks.all(-1).diagonal().sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", [(60, 9, 0.6), (3, 200, 0.3)])
def test_flex_attention_under_the_block_mask_is_the_dense_mask(shape) -> None:
    """Not compiled here, but by the same mask function and block lists that the CUDA kernel gets."""
    exit_T, _ = random_forest(np.random.default_rng(2), *shape)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(exit_T), 8, dtype=torch.float64) for heads in (4, 2, 2))
    ours = attention.flex_attention(
        query, key, value, block_mask=block_mask(torch.from_numpy(exit_T)), enable_gqa=True
    )
    reference = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense(exit_T), enable_gqa=True
    )
    # FlexAttention computes softmax in float32 or better; the rest is float64.
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)
