"""Routes of one micro-batch, without ranks: what a router takes, records and counts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_bridge.routing_replay import Routes
from tests.support.random_trees import random_routes
from treepo.routes import dtype_for, no_route

TYPES = {np.uint8: torch.uint8, np.uint16: torch.uint16}
EXPERTS = pytest.mark.parametrize("experts", [6, 300])
TOKENS, LAYERS, PER_TOKEN = 40, 3, 4


def given(experts: np.ndarray) -> Routes:
    """Routes [layers, T, k] that are known."""
    pairs = torch.zeros(len(experts), 2, dtype=torch.int64)
    return Routes(torch.from_numpy(experts), [True] * len(experts), None, pairs)


def choice_of(rng: np.random.Generator, experts: int) -> Tensor:
    return torch.from_numpy(random_routes(rng, TOKENS, 1, experts, PER_TOKEN)[:, 0].astype(np.int64))


@EXPERTS
def test_a_token_takes_its_route_or_without_one_the_routers_choice(experts: int) -> None:
    rng = np.random.default_rng(experts)
    routes = random_routes(rng, TOKENS, LAYERS, experts, PER_TOKEN, missing=0.3)
    choice = choice_of(rng, experts)
    replayed = given(routes.swapaxes(0, 1).copy())
    for layer in range(LAYERS):
        taken = replayed.take(layer, choice)
        differing = routed = 0
        for token in range(TOKENS):
            wanted, own = routes[token, layer].tolist(), choice[token].tolist()
            if wanted[0] == no_route(routes.dtype):
                assert taken[token].tolist() == own
                continue
            routed += 1
            differing += set(wanted) != set(own)
            assert set(taken[token].tolist()) == set(wanted)
        assert replayed.pairs[layer].tolist() == [differing, routed]
        assert 0 < differing <= routed < TOKENS


@EXPERTS
def test_equal_sets_keep_the_routers_order(experts: int) -> None:
    """The softmax over the experts' scores then adds them up in the same order as without replay."""
    choice = choice_of(np.random.default_rng(0), experts)
    reversed_ = choice.flip(1).numpy().astype(dtype_for(experts))[None].copy()
    replayed = given(reversed_)
    assert torch.equal(replayed.take(0, choice), choice)
    assert replayed.pairs.tolist() == [[0, TOKENS]]


@EXPERTS
def test_the_first_pass_is_recorded_and_later_ones_replay_it(experts: int) -> None:
    rng = np.random.default_rng(1)
    first, later = choice_of(rng, experts), choice_of(rng, experts)
    real = torch.arange(TOKENS) < TOKENS - 5  # the rest is padding
    empty = torch.empty(LAYERS, TOKENS, PER_TOKEN, dtype=TYPES[dtype_for(experts)])
    routes = Routes(empty, [False] * LAYERS, real, torch.zeros(LAYERS, 2, dtype=torch.int64))
    assert torch.equal(routes.take(1, first), first)
    assert routes.known == [False, True, False]
    for _ in range(2):  # a recomputation counts once
        taken = routes.take(1, later)
        assert torch.equal(taken[real].sort().values, first[real].sort().values)
        assert torch.equal(taken[~real], later[~real])
        assert routes.pairs[1, 1] == real.sum()
        assert routes.pairs[1, 0] > 0
    assert routes.pairs[0].tolist() == [0, 0]
