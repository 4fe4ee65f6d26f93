"""Routing replay: a mixture's routers take the experts that a token was given, with their own scores.

The routes of a micro-batch travel with its attention plan, which reaches every layer, of every pipeline stage
and in every recomputation. A hook before each layer hands the layer's routes to its router, so no order of
passes is assumed. Megatron-Core's own replay (`moe_enable_routing_replay`) has lists of routes for one order.

A token without a route, as padding is, gets the experts that the router would choose. Gradients flow through
the scores of the experts that were taken, whoever chose them, as without replay. Shared experts and layers
without experts have no part in this.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor
from torch.nn import Module

from megatron_bridge.architecture import Architecture
from treepo.learning.packing import Pack
from treepo.routes import dtype_for, no_route


@dataclass(slots=True, eq=False)
class Routes:
    """Routes of a micro-batch in this rank's layers with experts, of the T tokens that their routers see.

    experts: uint8 or uint16 [layers, T, k]. known: of each layer, whether its routes are set; the first pass
    through another layer records its router's choice. real: bool [T], false on padding, for which no route is
    recorded. pairs: int64 [layers, 2], what the last pass through each layer counted: tokens for which its
    router would have chosen another set of experts, and tokens with a route.
    """

    experts: Tensor
    known: list[bool]
    real: Tensor | None
    pairs: Tensor

    def take(self, layer: int, choice: Tensor) -> Tensor:
        """The experts that this rank's `layer` takes: int64 [T, k]. choice: the router's own, likewise."""
        missing = no_route(_NUMPY_TYPES[self.experts.dtype])
        if not self.known[layer]:
            assert self.real is not None, "given routes are known"
            self.experts[layer] = torch.where(self.real[:, None], choice, missing).to(self.experts.dtype)
            self.known[layer] = True
            return choice
        given = self.experts[layer].long()
        routed = given[:, 0] != missing
        same = (given[:, :, None] == choice[:, None, :]).any(2).all(1)
        differs = routed & ~same
        self.pairs[layer] = torch.stack([differs.sum(), routed.sum()])
        # Of equal sets the router's order is kept, so that no rounding differs from a pass without replay.
        return torch.where(differs[:, None], given, choice)


class RoutingReplay:
    """Replays routes in this rank's layers with experts.

    chunks: built with Megatron-Core's `moe_enable_routing_replay`. mode: `rollout` replays the routes of
    packs; `trainer` replays a micro-batch's first pass in its later ones. sequence_parallel: whether
    tensor-parallel ranks divide the tokens.
    """

    def __init__(
        self,
        chunks: Sequence[Module],
        architecture: Architecture,
        mode: Literal["trainer", "rollout"],
        sequence_parallel: bool,
    ) -> None:
        assert architecture.experts is not None, "a model without experts has no routes"
        self._mode, self._sequence_parallel = mode, sequence_parallel
        self._experts, self._model_layers = architecture.dimensions.experts, architecture.dimensions.layers
        self._per_token = architecture.experts.per_token
        self._dtype = np.dtype(dtype_for(self._experts))
        self._layers: list[int] = []  # by their numbers in the whole model
        for chunk in chunks:
            for layer in chunk.decoder.layers:  # type: ignore[union-attr]  # a module's attribute
                if (router := getattr(layer.mlp, "router", None)) is not None:
                    self._install(layer, router)

    def _install(self, layer: Module, router: Any) -> None:
        assert not router.config.moe_router_fusion, "the fused kernel replays nothing"
        # Megatron-Core lists the replays of all routers, for as long as the process lives.
        RouterReplay.global_router_replay_instances.remove(router.router_replay)
        router.router_replay = replay = _LayerReplay(len(self._layers))
        self._layers.append(int(router.layer_number) - 1)

        def hand(_layer: Module, _arguments: tuple[()], keywords: Mapping[str, Any]) -> None:
            replay.hand(keywords["attention_bias"].routes)

        layer.register_forward_pre_hook(hand, with_kwargs=True)

    def arrays(self, pack: Pack, own: np.ndarray) -> dict[str, np.ndarray]:
        """The part of a padded pack that `routes` needs on the device; none of a pack without a tree. own:
        int64, the tokens of this rank's slice. Raises ValueError if the pack's routes are not of this model.
        """
        blank = (pack.tree < 0).all()
        assert self._mode == "trainer" or blank or pack.route is not None, "the engines returned no routes"
        if blank or not self._layers:
            return {}
        mine = own[self._seen(len(own))]
        if self._mode == "trainer":
            return {"real": pack.tree[mine] >= 0}
        assert pack.route is not None
        self._check(pack.route)
        return {"experts": pack.route[mine[:, None], self._layers].swapaxes(0, 1)}

    def routes(self, arrays: Mapping[str, Tensor]) -> Routes | None:
        """The routes of a micro-batch from its `arrays` on the device; None if nothing is replayed in it."""
        if not arrays:
            return None
        layers = len(self._layers)
        real = arrays.get("real")
        if real is None:
            experts = arrays["experts"]
        else:
            size = (layers, len(real), self._per_token)
            experts = torch.empty(size, dtype=_TORCH_TYPES[self._dtype.name], device=real.device)
        pairs = torch.zeros(layers, 2, dtype=torch.int64, device=experts.device)
        return Routes(experts, [real is None] * layers, real, pairs)

    def _seen(self, tokens: int) -> slice:
        """The part of a slice's tokens that this rank's routers see."""
        if not self._sequence_parallel:
            return slice(0, tokens)
        size = tokens // parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        return slice(rank * size, (rank + 1) * size)

    def _check(self, route: np.ndarray) -> None:
        found, expected = route.shape[1:], (self._model_layers, self._per_token)
        if (route.dtype, found) != (self._dtype, expected):
            raise ValueError(
                f"a pack has routes of {found[0]} layers with {found[1]} experts each ({route.dtype}), the "
                f"model {expected[0]} layers with {expected[1]} ({self._dtype})"
            )
        beyond = (route >= self._experts) & (route != no_route(self._dtype))
        if beyond.any():
            raise ValueError(f"a pack's routes name expert {route[beyond][0]}; the model has {self._experts}")


class _LayerReplay(RouterReplay):
    """One router's. Its layer hands it the routes before each pass, and the router takes them once."""

    def __init__(self, layer: int) -> None:  # not the base's, which adds to the list of all routers
        self._layer = layer
        self._routes: list[Routes | None] = []

    def hand(self, routes: Routes | None) -> None:
        self._routes = [routes]

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices of the experts of each token: [T, k]. scores: [T, experts]."""
        assert default_compute_topk is not None
        assert self._routes, "the layer handed over no routes for this pass"
        routes = self._routes.pop()
        own_scores, choice = default_compute_topk(scores, topk, num_groups, group_topk)
        if routes is None:
            return own_scores, choice
        experts = routes.take(self._layer, choice)
        return scores.gather(1, experts), experts


_TORCH_TYPES = {"uint8": torch.uint8, "uint16": torch.uint16}
_NUMPY_TYPES = {torch.uint8: np.uint8, torch.uint16: np.uint16}


def own_choice_differs(routes: Iterable[Routes | None], device: torch.device) -> float:
    """The share of (token, layer) pairs with a route whose router would have chosen another set of experts in
    the last pass; 0 without any. Of all ranks, from each one's micro-batches. Collective.
    """
    counts = [each.pairs.sum(0) for each in routes if each is not None]
    total = torch.stack([torch.zeros(2, dtype=torch.int64, device=device), *counts]).sum(0)
    dist.all_reduce(total)
    differing, routed = total.tolist()
    return differing / max(routed, 1)
