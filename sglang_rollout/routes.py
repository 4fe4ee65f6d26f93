"""The routes in SGLang's answers (`treepo.routes`).

SGLang keeps the experts of each token beside its KV cache, so those of a cached token come from the request
that computed it. An answer has them once, at the request's end.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treepo.errors import EngineError, ModelError
from treepo.routes import dtype_for

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in config.json, by family


def experts_of(config: Mapping[str, Any]) -> int:
    """The number of experts of a layer by config.json; 0 for a dense model."""
    return max((config.get(name) or 0 for name in _EXPERTS), default=0)


@dataclass(frozen=True, slots=True)
class RouteFormat:
    """What one token's route is: for each of `layers` layers the indices of `chosen` of its `experts`."""

    experts: int
    layers: int
    chosen: int

    @classmethod
    def of(cls, model: Path) -> "RouteFormat":
        """Of a model folder. Raises ModelError for a dense model."""
        config = json.loads((model / "config.json").read_text())
        experts = experts_of(config)
        if experts < 2:
            raise ModelError(
                f"{model / 'config.json'}: this model has no experts, so its engines return no routes; "
                "trainer.routing_replay = none is allowed"
            )
        return cls(experts, config["num_hidden_layers"], config["num_experts_per_tok"])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(dtype_for(self.experts))

    def read(self, text: str | None, tokens: int) -> np.ndarray:
        """The routes of `tokens` tokens from SGLang's base64 text: uint8 or uint16 [T, layers, chosen].

        Raises EngineError for another number of them, or for experts that no router chose.
        """
        if text is None:
            raise EngineError(f"SGLang returned no routes; those of {tokens} tokens were requested")
        content = base64.b64decode(text)
        each = self.layers * self.chosen * self.dtype.itemsize
        if len(content) != tokens * each:
            raise EngineError(
                f"SGLang returned {len(content)} bytes of routes; {tokens} tokens with {self.chosen} experts "
                f"in each of {self.layers} layers have {tokens * each}"
            )
        routes = np.frombuffer(content, self.dtype).reshape(tokens, self.layers, self.chosen)
        self._check(routes)
        return routes

    def _check(self, routes: np.ndarray) -> None:
        """Some of SGLang's kernels for experts do not record them, and leave zeros."""
        if not len(routes):
            return
        chosen = np.sort(routes[0], axis=-1)
        if routes.max() >= self.experts or (chosen[:, 1:] == chosen[:, :-1]).any():
            raise EngineError(
                f"SGLang returned experts {routes[0, 0].tolist()} for a token, which are not {self.chosen} "
                f"different ones of {self.experts}; leave out engine.sglang.moe_runner_backend"
            )
