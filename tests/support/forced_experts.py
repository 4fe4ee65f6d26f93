"""transformers' mixtures with routers that take the experts that a token is given: naive routing replay."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from tests.support.routed_trees import with_given_routes
from treepo.routes import dtype_for, no_route
from treepo.tree import PROMPT, Tree


class ForcedExperts:
    """A network in float32. given: the routes of the tokens of the next pass, as in `treepo.routes`; None if
    all routers choose. chosen: each layer's choice in the last pass, [T, k], by its number.
    """

    def __init__(self, folder: Path) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # The padding token would have no gradient, and the trees use it.
        self.network.get_input_embeddings().padding_idx = None  # type: ignore[assignment]  # typed as a module
        self.given: np.ndarray | None = None
        self.chosen: dict[int, Tensor] = {}
        for number, layer in enumerate(self.network.model.layers):
            if hasattr(layer.mlp, "gate"):
                self._force(number, layer.mlp.gate)

    def _force(self, number: int, gate: Any) -> None:
        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = linear(hidden, gate.weight)
            own = logits.topk(gate.top_k).indices
            self.chosen[number] = own
            experts = own
            if self.given is not None:
                given = torch.from_numpy(self.given[:, number].astype(np.int64))
                experts = torch.where(given == no_route(self.given.dtype), own, given)
            scores = logits.softmax(-1).gather(1, experts)
            if gate.norm_topk_prob:
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores, experts

        gate.forward = forward

    def log_probs(self, tree: Tree, temperature: float) -> dict[tuple[int, int], float]:
        """Every token's log-prob under its segment and offset, each trajectory by itself, with the routes of
        the tree if it has any.
        """
        values = {}
        for path in _paths(tree):
            tokens = torch.from_numpy(np.concatenate([_tokens(tree, node) for node in path])).long()
            routes = [_routes(tree, node) for node in path]
            self.given = None if any(each is None for each in routes) else np.concatenate(routes)  # type: ignore[arg-type]  # none is None
            with torch.no_grad():
                log_p = (self.network(tokens[None]).logits[0] / temperature).log_softmax(-1)
            places = [(node, offset) for node in path for offset in range(len(_tokens(tree, node)))]
            for index in range(1, len(tokens)):
                values[places[index]] = float(log_p[index - 1, tokens[index]])
        return values

    def with_own_choice(self, tree: Tree) -> Tree:
        """The tree with the routes that these weights choose; layers without experts have zeros."""
        config = self.network.config
        shape = (config.num_hidden_layers, config.num_experts_per_tok)
        routes: dict[int, np.ndarray] = {}
        self.given = None
        for path in _paths(tree):
            lengths = [len(_tokens(tree, node)) for node in path]
            tokens = torch.from_numpy(np.concatenate([_tokens(tree, node) for node in path])).long()
            with torch.no_grad():
                self.network(tokens[None])
            of_path = np.zeros((len(tokens), *shape), dtype_for(config.num_experts))
            for layer, chosen in self.chosen.items():
                of_path[:, layer] = chosen.numpy()
            routes |= zip(path, np.split(of_path, np.cumsum(lengths[:-1])), strict=True)
        return with_given_routes(tree, lambda segment, _: routes[segment])


def _paths(tree: Tree) -> list[list[int]]:
    return [[PROMPT, *tree.path(leaf.segment)] for leaf in tree.leaves]


def _tokens(tree: Tree, node: int) -> np.ndarray:
    return tree.prompt if node == PROMPT else tree.segments[node].tokens


def _routes(tree: Tree, node: int) -> np.ndarray | None:
    return tree.prompt_routes if node == PROMPT else tree.segments[node].routes
