"""Floating-point operations of the model's forward pass over all ranks; a multiply-add counts as two.

Only matrix products count: embedding look-up, norms, rotation and activation functions are bound by memory. A
backward pass takes twice as many; recomputation of whole layers adds one forward pass.
"""

from megatron_bridge.architecture import Architecture


def forward_flops(architecture: Architecture, tokens: float, pairs: float) -> float:
    """`tokens` packed tokens with logits, and `pairs` of a token and one it attends to (itself included)."""
    per_token = _layers_flops(architecture) + logits_flops(architecture)
    return tokens * per_token + pairs * pair_flops(architecture)


def _layers_flops(architecture: Architecture) -> float:
    """One token in the matrices of all layers, without attention's scores and sums.

    Only the experts that a token is sent to and the shared one count.
    """
    dimensions, hidden = architecture.dimensions, architecture.hidden
    sparse = len(dimensions.sparse_layers)
    # Query and output projection, key and value projection.
    attention = 2 * hidden * dimensions.head_dim * (architecture.heads + dimensions.groups)
    dense = (dimensions.layers - sparse) * 3 * hidden * architecture.intermediate
    total = dimensions.layers * attention + dense
    if architecture.experts is not None:
        chosen = 3 * hidden * architecture.experts.intermediate * architecture.experts.per_token
        total += sparse * (chosen + hidden * dimensions.experts)
        if architecture.experts.shared:  # and its gate
            total += sparse * hidden * (3 * architecture.experts.shared + 1)
    return 2.0 * total


def logits_flops(architecture: Architecture) -> float:
    """One token's logits. The trainer computes them only for tokens whose log-prob is needed."""
    return 2.0 * architecture.hidden * architecture.dimensions.vocabulary


def pair_flops(architecture: Architecture) -> float:
    """One pair in all layers: a score and its share of the sum of values."""
    dimensions = architecture.dimensions
    return 4.0 * dimensions.layers * architecture.heads * dimensions.head_dim
