"""Tree attention: both kinds of plan agree with the dense mask on random forests."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megatron_bridge import attention
from megatron_bridge.attention import AttentionPlan, Slices, attend, block_mask, plan_attention
from megatron_bridge.rotary import cos_sin, inverse_frequency, rotate
from treepo.learning.slicing import block_size, pack_slices, sliced_length


def random_forest(
    rng: np.random.Generator, nodes: int, longest: int, branching: float
) -> tuple[np.ndarray, np.ndarray]:
    """Exit and position of a forest whose nodes have 1 to `longest` tokens.

    A node is a child of the node before it or, with probability `branching`, of an earlier node or of none.
    """
    path: list[int] = []  # tokens from the root through each open node
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


def cpu_plan(exit_T: np.ndarray, position_T: np.ndarray, head_dim: int) -> AttentionPlan:
    exits, positions = torch.from_numpy(exit_T), torch.from_numpy(position_T)
    return plan_attention(exits, positions, frequency(head_dim), torch.float64)


def dense(exit_T: np.ndarray) -> Tensor:
    query, key = np.arange(len(exit_T))[:, None], np.arange(len(exit_T))[None]
    return torch.from_numpy((key <= query) & (query < exit_T[None]))


def attend_densely(
    query: Tensor, key: Tensor, value: Tensor, exit_T: np.ndarray, position_T: np.ndarray
) -> Tensor:
    """The definition: every head written out, rotation by complex numbers."""
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
    plan = cpu_plan(exit_T, position_T, 6)
    results = [
        [output, *torch.autograd.grad((output * weight).sum(), inputs)]
        for output in (
            attend(query, key, value, plan),
            attend_densely(query, key, value, exit_T, position_T),
        )
    ]
    for ours, reference in zip(*results, strict=True):
        # Both are sums of a few hundred float64 terms of about 1, in different orders.
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


def test_cost_follows_the_allowed_pairs() -> None:
    """Sixteen small trees: far below T^2, and within a small factor of the allowed pairs."""
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
    """Five tokens in a block of 64: the 59 empty rows must not turn into NaN."""
    exit_T = np.array([3, 3, 3, 4, 5], dtype=np.int32)
    position_T = np.array([0, 1, 2, 0, 0], dtype=np.int32)
    plan = cpu_plan(exit_T, position_T, 4)
    query, key, value = (torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    output = attend(query, key, value, plan)
    gradients = torch.autograd.grad(output[:3].sum(), [query, key, value])
    assert all(gradient.isfinite().all() for gradient in (output, *gradients))
    assert (gradients[2][3:] == 0).all()


@pytest.mark.parametrize("shape", FORESTS.values(), ids=FORESTS.keys())
@pytest.mark.parametrize("seed", range(3))
def test_the_block_mask_is_the_one_that_torch_makes_from_all_pairs(
    shape, seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CUDA_BLOCK", 16)
    exit_T, _ = random_forest(np.random.default_rng(seed), *shape)
    ours = block_mask(torch.from_numpy(exit_T))
    length = len(exit_T) + -len(exit_T) % 16
    every = torch.eye(length, dtype=torch.bool)  # past the end, tokens see themselves
    every[: len(exit_T), : len(exit_T)] = dense(exit_T)
    index = torch.arange(length)
    allowed: Any = ours.mask_mod  # torch types it as one of two signatures
    assert torch.equal(allowed(index, index, index[:, None], index[None]), every)
    theirs = create_block_mask(
        lambda _batch, _head, query, key: every[query, key], 1, 1, length, length, "cpu", BLOCK_SIZE=16
    )
    assert ours.shape == theirs.shape
    # The key blocks of every query block, and for the backward pass the query blocks of every key block.
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(_chosen(ours, kind), _chosen(theirs, kind))


def _chosen(mask: BlockMask, kind: str) -> Tensor:
    """The blocks of one of a mask's four lists, as a boolean matrix."""
    counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
    chosen = torch.zeros(indices.shape, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        chosen[row, indices[row, :count].long()] = True
        assert len(set(indices[row, :count].tolist())) == count
    return chosen


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run FlexAttention without compiling it, operation by operation on the CPU, gradients included."""
    monkeypatch.setattr(attention, "_compiled", lambda attend: attend)
    # Torch refuses gradients on a CPU because its compiled CPU kernel has none; uncompiled they exist.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("shape", FORESTS.values(), ids=FORESTS.keys())
def test_on_cuda_values_and_gradients_are_those_of_the_cpu_and_of_the_dense_mask(shape) -> None:
    """Seven query heads on each of two groups; lengths that no block divides."""
    exit_T, position_T = random_forest(np.random.default_rng(2), *shape)
    torch.manual_seed(0)
    query, key, value = inputs = [
        torch.randn(len(exit_T), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (14, 2, 2)
    ]
    weight = torch.randn(len(exit_T), 14, 8, dtype=torch.float64)
    plan = cpu_plan(exit_T, position_T, 8)
    on_cuda = replace(plan, mask=block_mask(torch.from_numpy(exit_T)))
    sparse, gathered, reference = (
        [output, *torch.autograd.grad((output * weight).sum(), inputs)]
        for output in (
            attend(query, key, value, on_cuda),
            attend(query, key, value, plan),
            attend_densely(query, key, value, exit_T, position_T),
        )
    )
    for ours, cpu, exact in zip(sparse, gathered, reference, strict=True):
        # The tolerance is that of the test above: torch's own gradient of FlexAttention is float64 here too.
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours, cpu, rtol=0, atol=1e-12)


def test_lengths_and_masks_are_compiled_for_once() -> None:
    """A run sees as many lengths as micro-batches, but torch compiles for at most eight kinds of input."""
    torch._dynamo.reset()
    lengths = []

    def backend(graph: torch.fx.GraphModule, _inputs: object):
        (call,) = (node for node in graph.graph.nodes if node.target is torch.ops.higher_order.flex_attention)
        query: Any = call.args[0]  # a node
        lengths.append(query.meta["example_value"].shape[2])
        return graph.forward

    compiled = torch.compile(attention.attend_blocks, backend=backend, fullgraph=True)
    rng = np.random.default_rng(0)
    for number in range(12):
        exit_T, _ = random_forest(rng, 10 + 9 * (number // 2), 60, 0.5)
        mask = block_mask(torch.from_numpy(exit_T))
        projected = torch.randn(len(exit_T), 8, 8)  # as the model's projection gives them: views of it
        query, key, value = (part.bfloat16() for part in projected.split([4, 2, 2], dim=1))
        cos, sin = torch.randn(2, len(exit_T), 1, 4)
        inputs = (*(attention._in_blocks(x) for x in (query, key, value, cos, sin)), mask)
        with torch.set_grad_enabled(number % 2 == 0):
            compiled(*inputs)  # type: ignore[reportCallIssue]  # their number is not in the type
    # The first length and all others, each with and without gradients.
    assert 2 <= len(lengths) <= 4
    # The kernels omit bounds checks if the length is known to be a multiple of 128.
    assert all(statically_known_true(length % 128 == 0) for length in lengths)
    assert any(isinstance(length, torch.SymInt) for length in lengths)


class Exchange:
    """Context-parallel ranks in one process: what one gathers is every rank's rotated keys and values."""

    def __init__(self, key: Tensor, value: Tensor, position_T: np.ndarray, rows: np.ndarray) -> None:
        cos, sin = cos_sin(torch.from_numpy(position_T), frequency(key.shape[-1]))
        whole = torch.cat([rotate(key, cos, sin), value], dim=-1)
        self._slices = torch.from_numpy(rows)
        self._gathered = whole[self._slices.reshape(-1)]

    def slices(self, rank: int) -> Slices:
        return Slices(self._slices[rank], self._slices.reshape(-1), rank)  # type: ignore[arg-type]  # for a group

    def gather(self, parts: Sequence[Tensor], group: Any) -> Sequence[Tensor]:
        size = self._slices.shape[1]
        own = self._gathered[group * size : (group + 1) * size]
        torch.testing.assert_close(torch.cat(list(parts), dim=1), own, rtol=0, atol=0)  # this rank's
        return self._gathered.tensor_split(len(parts), dim=1)


def sliced_attention(
    inputs: list[Tensor], exit_T: np.ndarray, position_T: np.ndarray, rows: np.ndarray, on_cuda: bool
) -> Tensor:
    """The output of all ranks, in the pack's order."""
    query, key, value = inputs
    exchange = Exchange(key, value, position_T, rows)
    exits, positions = torch.from_numpy(exit_T), torch.from_numpy(position_T)
    output = torch.empty_like(query)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "gathered", exchange.gather)
        for rank, own in enumerate(torch.from_numpy(rows)):
            slices = exchange.slices(rank)
            plan = plan_attention(exits, positions, frequency(query.shape[-1]), torch.float64, slices)
            if on_cuda:
                plan = replace(plan, mask=block_mask(exits, slices))
            output = output.index_copy(0, own, attend(query[own], key[own], value[own], plan))
    return output


def sliced_forest(
    shape: tuple[int, int, float], ranks: int, least: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exit and position of a forest, padded as a pack is, and the tokens of each rank."""
    exit_T, position_T = random_forest(np.random.default_rng(3), *shape)
    tokens = len(exit_T)
    block = block_size(tokens, ranks, least, most)
    length = sliced_length(tokens, ranks, block, 1)
    exit_T = np.concatenate([exit_T, np.arange(tokens, length) + 1]).astype(np.int32)
    position_T = np.pad(position_T, (0, length - tokens))
    return exit_T, position_T, pack_slices(position_T, ranks, block)


RANKS_AND_GROUPS = [(2, 1), (2, 2), (4, 3)]  # one group is not divided, and three are divided unequally


def assert_sliced_is_dense(
    shape: tuple[int, int, float], ranks: int, groups: int, blocks: tuple[int, int], on_cuda: bool
) -> None:
    exit_T, position_T, rows = sliced_forest(shape, ranks, *blocks)
    torch.manual_seed(1)
    query, key, value = inputs = [
        torch.randn(len(exit_T), heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (2 * groups, groups, groups)
    ]
    weight = torch.randn(len(exit_T), 2 * groups, 8, dtype=torch.float64)
    results = [
        [output, *torch.autograd.grad((output * weight).sum(), inputs)]
        for output in (
            sliced_attention(inputs, exit_T, position_T, rows, on_cuda),
            attend_densely(query, key, value, exit_T, position_T),
        )
    ]
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)  # as above


@pytest.mark.parametrize(("ranks", "groups"), RANKS_AND_GROUPS)
@pytest.mark.parametrize("shape", FORESTS.values(), ids=FORESTS.keys())
def test_slices_attend_as_the_whole_pack(shape, ranks: int, groups: int) -> None:
    """Values and gradients in float64 are those of the dense mask; also with more ranks than tokens."""
    assert_sliced_is_dense(shape, ranks, groups, (1, attention.CPU_BLOCK), on_cuda=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize(("ranks", "groups"), RANKS_AND_GROUPS)
@pytest.mark.parametrize("shape", FORESTS.values(), ids=FORESTS.keys())
def test_on_cuda_slices_attend_as_the_whole_pack(
    shape, ranks: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CUDA_BLOCK", 16)
    assert_sliced_is_dense(shape, ranks, groups, (16, 16), on_cuda=True)


@pytest.mark.parametrize("shape", FORESTS.values(), ids=FORESTS.keys())
def test_the_block_mask_of_a_slice_is_the_one_that_torch_makes(
    shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CUDA_BLOCK", 16)
    exit_T, _, rows = sliced_forest(shape, 3, 16, 16)
    gathered = torch.from_numpy(rows.reshape(-1))
    every = dense(exit_T)
    for own in torch.from_numpy(rows):
        ours = block_mask(torch.from_numpy(exit_T), Slices(own, gathered, None))  # type: ignore[arg-type]  # unused
        mine = every[own][:, gathered]
        theirs = create_block_mask(
            lambda _batch, _head, query, key, mine=mine: mine[query, key],
            *(1, 1, len(own), len(gathered), "cpu"),
            BLOCK_SIZE=16,
        )
        assert ours.shape == theirs.shape
        for kind in ("kv", "full_kv", "q", "full_q"):
            assert torch.equal(_chosen(ours, kind), _chosen(theirs, kind))


def test_lengths_of_slices_are_compiled_for_once() -> None:
    """As above, for a rank's queries and the gathered keys."""
    torch._dynamo.reset()
    lengths = []

    def backend(graph: torch.fx.GraphModule, _inputs: object):
        (call,) = (node for node in graph.graph.nodes if node.target is torch.ops.higher_order.flex_attention)
        query, key = call.args[:2]
        lengths.append([x.meta["example_value"].shape[2] for x in (query, key)])  # type: ignore[reportAttributeAccessIssue]  # nodes
        return graph.forward

    compiled = torch.compile(attention.attend_rotated_blocks, backend=backend, fullgraph=True)
    for number in range(6):
        exit_T, _, rows = sliced_forest((20 + 9 * number, 60, 0.5), 2, 128, 128)
        own, *_ = torch.from_numpy(rows)
        mask = block_mask(torch.from_numpy(exit_T), Slices(own, torch.from_numpy(rows).reshape(-1), None))  # type: ignore[arg-type]  # unused
        query, key, value = (
            torch.randn(tokens, heads, 8)
            for tokens, heads in ((len(own), 4), (len(exit_T), 2), (len(exit_T), 2))
        )
        compiled(*(attention._in_blocks(x) for x in (query, key, value)), mask)  # type: ignore[reportCallIssue]  # their number is not in the type
    assert len(lengths) <= 3
    for query_length, key_length in lengths:
        assert statically_known_true(query_length % 128 == 0)
        assert statically_known_true(key_length % 128 == 0)
    assert any(isinstance(length, torch.SymInt) for length in lengths[-1])
