"""Routes of one micro-batch, without ranks: what a router takes, records and counts."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import Qwen3MoeConfig

from megatron_bridge.architecture import Architecture, read_architecture
from megatron_bridge.attention import AttentionPlan, plan_attention
from megatron_bridge.routing_replay import Routes, RoutingReplay
from tests.support.routed_trees import random_routes
from tests.support.small_trees import tree_of
from treepo.config.learning import LearningConfig
from treepo.learning.advantage import estimate
from treepo.learning.packing import Pack, blank_pack, pack_trees
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


class Layer(Module):
    """Stands for a layer of Megatron-Core: its router sees the scores that it is given. number: from 1."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.mlp = Module()
        self.mlp.router = self.router = Router(number)

    def forward(self, scores: Tensor, *, attention_bias: AttentionPlan) -> tuple[Tensor, Tensor]:
        del attention_bias
        return self.router(scores)


class Router(Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(moe_router_fusion=False)
        self.layer_number, self.router_replay = number, RouterReplay()

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return self.router_replay.get_replay_topk(
            scores, 2, default_compute_topk=lambda scores, k, *_: torch.topk(scores, k, dim=1)
        )


@pytest.fixture
def architecture(tmp_path: Path) -> Architecture:
    """Three layers, of which the second is dense; six experts, two a token."""
    Qwen3MoeConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ).save_pretrained(tmp_path)
    return read_architecture(tmp_path)


def replayed_by(layers: list[Layer], architecture: Architecture) -> RoutingReplay:
    chunk = Module()
    chunk.decoder = Module()
    chunk.decoder.layers = ModuleList(layers)
    before = len(RouterReplay.global_router_replay_instances)
    replay = RoutingReplay([chunk], architecture, "rollout", sequence_parallel=False)
    assert len(RouterReplay.global_router_replay_instances) == before - len(layers)
    return replay


def pack_with(route: np.ndarray | None) -> Pack:
    tree = tree_of([-1, 0, 0], [1.0, 0.0], lengths=[4, 3, 2])
    ((pack,),) = pack_trees([tree], estimate([tree], LearningConfig()), 100, 1)
    return replace(pack, route=route)


def whole(replay: RoutingReplay, pack: Pack) -> dict[str, np.ndarray]:
    """The arrays of one rank that has all tokens."""
    return replay.arrays(pack, np.arange(len(pack)))


def test_every_router_gets_the_routes_of_its_layer_once(architecture: Architecture) -> None:
    """In whatever order layers and micro-batches are computed, and computed again."""
    rng, layers = np.random.default_rng(2), [Layer(1), Layer(3)]
    replay = replayed_by(layers, architecture)
    packs = [pack_with(random_routes(rng, 11, 3, 6, 2)) for _ in range(2)]
    plans = []
    for pack in packs:
        arrays = {name: torch.from_numpy(array.copy()) for name, array in whole(replay, pack).items()}
        exit_T, position_T = (torch.from_numpy(column.copy()) for column in (pack.exit, pack.position))
        plan = plan_attention(exit_T, position_T, torch.ones(2), torch.float32)
        plans.append(replace(plan, routes=replay.routes(arrays)))
    scores = torch.from_numpy(rng.normal(size=(11, 6)))
    for batch, layer in [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]:
        values, experts = layers[layer](scores, attention_bias=plans[batch])
        route = packs[batch].route
        assert route is not None
        wanted = route[:, 2 * layer].astype(np.int64)
        assert np.array_equal(np.sort(experts.numpy()), np.sort(wanted))
        assert torch.equal(values, scores.gather(1, experts))
    free = replace(plans[0], routes=None)
    assert torch.equal(layers[0](scores, attention_bias=free)[1], scores.topk(2).indices)
    with pytest.raises(AssertionError, match="no routes for this pass"):
        layers[0].router(scores)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (
            np.zeros((11, 2, 2), np.uint8),
            "routes of 2 layers with 2 experts each (uint8), the model 3 layers",
        ),
        (
            np.zeros((11, 3, 1), np.uint8),
            "routes of 3 layers with 1 experts each (uint8), the model 3 layers",
        ),
        (np.zeros((11, 3, 2), np.uint16), "(uint16), the model 3 layers with 2 (uint8)"),
        (np.full((11, 3, 2), 6, np.uint8), "routes name expert 6; the model has 6"),
    ],
)
def test_routes_of_another_model_are_refused(
    route: np.ndarray, message: str, architecture: Architecture
) -> None:
    replay = replayed_by([Layer(1), Layer(3)], architecture)
    with pytest.raises(ValueError, match=re.escape(message)):
        whole(replay, pack_with(route))


def test_only_a_pack_without_a_tree_may_lack_routes(architecture: Architecture) -> None:
    replay = replayed_by([Layer(1), Layer(3)], architecture)
    assert replay.routes({}) is None
    assert whole(replay, blank_pack()) == {}
    with pytest.raises(AssertionError, match="returned no routes"):
        whole(replay, pack_with(None))


def test_a_slice_has_the_routes_of_its_own_tokens(architecture: Architecture) -> None:
    pack = pack_with(random_routes(np.random.default_rng(2), 11, 3, 6, 2))
    assert pack.route is not None
    own = np.array([2, 3, 8, 9])
    found = replayed_by([Layer(1), Layer(3)], architecture).arrays(pack, own)["experts"]
    assert np.array_equal(found, np.stack([pack.route[own, 0], pack.route[own, 2]]))
