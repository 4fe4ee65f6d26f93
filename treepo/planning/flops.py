"""Floating-point operations of the trainer's forward pass; a multiply-add counts as two.

Counted are matrix products: the embedding's look-up, norms, rotation and activation functions are bound by
memory, not by these. A backward pass takes twice as many, recomputation of whole layers once as many more.
"""

from megatron_bridge.architecture import Architecture


def forward_flops(architecture: Architecture, tokens: float, pairs: float) -> float:
    """For `tokens` packed tokens, all of which have logits, and `pairs` of tokens of which one attends to the
    other (a token attends to itself, too): of the whole model, over all ranks.

    Of the experts, only those that a token is sent to count.
    """
    return tokens * (layers_flops(architecture) + logits_flops(architecture)) + pairs * pair_flops(
        architecture
    )


def layers_flops(architecture: Architecture) -> float:
    """One token's, of all layers' matrices; without attention's scores and sums."""
    dimensions, hidden = architecture.dimensions, architecture.hidden
    sparse = len(dimensions.sparse_layers)
    # Query and output projection, key and value projection.
    attention = 2 * hidden * dimensions.head_dim * (architecture.heads + dimensions.groups)
    total = (
        dimensions.layers * attention + (dimensions.layers - sparse) * 3 * hidden * architecture.intermediate
    )
    if architecture.experts is not None:
        chosen = 3 * hidden * architecture.experts.intermediate * architecture.experts.per_token
        total += sparse * (chosen + hidden * dimensions.experts)
    return 2.0 * total


def logits_flops(architecture: Architecture) -> float:
    """One token's. The trainer computes logits only where a log-prob is wanted."""
    return 2.0 * architecture.hidden * architecture.dimensions.vocabulary


def pair_flops(architecture: Architecture) -> float:
    """One pair's, of all layers: a score and its share of the sum of values."""
    dimensions = architecture.dimensions
    return 4.0 * dimensions.layers * architecture.heads * dimensions.head_dim
