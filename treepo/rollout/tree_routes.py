"""The routes of a growing tree's tokens: which are asked for, which one a token keeps (`treepo.routes`)."""

import numpy as np

from treepo.errors import EngineError
from treepo.protocols import GenerateOutput
from treepo.rollout.path import PathRequest
from treepo.routes import has_route, no_route


class TreeRoutes:
    """wanted: whether the tree has routes; if not, nothing is asked for and every method does nothing.
    of_prompt: of the prompt's tokens, once the tree's first request has brought them.
    """

    def __init__(self, wanted: bool) -> None:
        self.of_prompt: np.ndarray | None = None
        self._wanted = wanted

    def asked_from(self, path: PathRequest) -> int | None:
        """The first context token whose route `path` asks for next.

        It is the last one, which the request that sampled it did not read; of cached tokens the tree has the
        routes already. The tree's first request asks for the whole prompt's.
        """
        if not self._wanted:
            return None
        return 0 if _is_first(path) else len(path.context) - 1

    def take(self, path: PathRequest, output: GenerateOutput) -> np.ndarray | None:
        """Keep the routes of context tokens that an output brings.

        Returns the routes of the context's last token and of all the output's tokens but the last; None
        without routes. Raises EngineError for routes that do not fit the request.
        """
        first, routes = self.asked_from(path), output.routes
        if first is None:
            return None
        wanted = len(path.context) - first + len(output.tokens) - 1
        if routes is None or len(routes) != wanted:
            found = "no routes" if routes is None else f"the routes of {len(routes)} tokens"
            raise EngineError(f"the engine returned {found}; those of {wanted} were requested")
        if _is_first(path):
            self.of_prompt = routes[: len(path.context)].copy()
        routes = routes[len(path.context) - 1 - first :]
        if not path.new_nodes:
            path.route_above = routes[0].copy()
        elif path.last_node is not None and path.last_node.routes is not None:
            path.last_node.routes[-1] = routes[0]
        return routes

    def path_ended(self, path: PathRequest) -> None:
        """Drop the route of the trajectory's last token.

        The engine may have read the token, or not: that depends on where its stop rule looks.
        """
        if path.last_node is not None and path.last_node.routes is not None:
            path.last_node.routes[-1] = no_route(path.last_node.routes.dtype)

    def round_ended(self, path: PathRequest) -> None:
        """Give the token above the path's new nodes the route that the path read, if it has none yet.

        Called in the order of path requests, so the first child decides, whichever was answered first.
        """
        above = path.new_nodes[0].parent
        if above is not None and above.routes is not None and not has_route(above.routes[-1]):
            assert path.route_above is not None
            above.routes[-1] = path.route_above


def _is_first(path: PathRequest) -> bool:
    """Whether `path` sends the tree's first request next."""
    return path.number == 0 and not path.new_nodes
