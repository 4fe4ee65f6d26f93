"""Counts a driver's trees, requests and tokens, and computes ratios from them."""

from dataclasses import dataclass

from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.tree import Tree


@dataclass(slots=True)
class Stats:
    """Counters of a driver, since it was made or `take_stats` was last called."""

    trees: int = 0
    failed_trees: int = 0
    leaves: int = 0
    branchings: int = 0  # paths that got more than one child, of which a lookahead may leave one
    fallbacks: int = 0  # times that a tree ran out of active paths before it had its leaves
    requests: int = 0
    failed_requests: int = 0
    interrupted_requests: int = 0  # answered in part, because a weight sync began or the engine was held
    decoded_tokens: int = 0
    dropped_tokens: int = 0  # decoded past the boundary at which the path ended
    pruned_tokens: int = 0  # decoded for children that a lookahead gave up
    total_tokens: int = 0  # of all responses; a shared token counts once for each response
    prompt_tokens: int = 0  # contexts of all requests
    cached_tokens: int = 0  # prompt_tokens that were found in the prefix cache
    # Contexts of requests below a segment. The last token of each is left out: an engine always computes it.
    continuation_tokens: int = 0
    continuation_cached_tokens: int = 0

    @property
    def cached_token_ratio(self) -> float:
        """Share of the continuations' reusable context that was found in the prefix cache."""
        return self.continuation_cached_tokens / max(self.continuation_tokens, 1)

    @property
    def total_over_unique(self) -> float:
        """Tokens that independent samples of the same responses would decode, per token decoded here."""
        return self.total_tokens / max(self.decoded_tokens - self.dropped_tokens, 1)

    def count_request(
        self, request: GenerateRequest, output: GenerateOutput, taken: int, below_prompt: bool
    ) -> None:
        """Add an answered request. taken: tokens that the tree kept of it."""
        context_tokens = len(request.context)
        self.requests += 1
        self.interrupted_requests += output.finish == "interrupted"
        self.decoded_tokens += len(output.tokens)
        self.dropped_tokens += len(output.tokens) - taken
        self.prompt_tokens += context_tokens
        self.cached_tokens += output.cached_tokens
        if not below_prompt:
            self.continuation_tokens += context_tokens - 1
            self.continuation_cached_tokens += output.cached_tokens

    def count_tree(self, tree: Tree, branchings: int, fallbacks: int, pruned_tokens: int) -> None:
        """Add a finished tree."""
        self.trees += 1
        self.leaves += len(tree.leaves)
        self.total_tokens += tree.total_tokens()
        self.branchings += branchings
        self.fallbacks += fallbacks
        self.pruned_tokens += pruned_tokens
