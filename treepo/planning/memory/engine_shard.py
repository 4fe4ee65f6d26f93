"""What one tensor-parallel rank of an SGLang 0.5.16 engine holds of a model: parameters and KV values.

Heads and the rows of every MLP and expert are divided among the ranks. Key-value heads are divided until each
rank has one, and replicated from there on. The vocabulary is padded to a multiple of 64 and divided; norms
and routers are whole on every rank. SGLang's Qwen2-MoE and Qwen3-MoE have no dense layers; here they are
counted as the model's configuration says. SGLang's rotary tables (float32, positions x head size) count as
runtime memory.
"""

from dataclasses import dataclass

from megatron_bridge.architecture import Architecture
from treepo.errors import ConfigError

_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class EngineShard:
    """Parameters and KV values of one rank.

    embedding: the input table, of which a step reads one row a request. output: the output matrix, 0 if it is
    the embedding. experts: all routed experts. kv_values: numbers in the KV cache for one token.
    """

    embedding: int
    output: int
    layers: int
    experts: int
    kv_values: int

    @property
    def parameters(self) -> int:
        return self.embedding + self.output + self.layers + self.experts


def engine_shard(architecture: Architecture, tensor: int) -> EngineShard:
    """Raises ConfigError if `tensor` ranks cannot share the model."""
    _check(architecture, tensor)
    dimensions, hidden, family = architecture.dimensions, architecture.hidden, architecture.family
    size = dimensions.head_dim
    queries, groups = architecture.heads // tensor * size, max(1, dimensions.groups // tensor) * size
    attention = hidden * (2 * queries + 2 * groups) + 2 * hidden
    if family.qkv_bias:
        attention += queries + 2 * groups
    if family.qk_norm:
        attention += 2 * size
    sparse = len(dimensions.sparse_layers)
    dense = (dimensions.layers - sparse) * 3 * hidden * (architecture.intermediate // tensor)
    if family.output_bias:
        attention += hidden
    experts = router = shared = 0
    if architecture.experts is not None:
        router = sparse * hidden * dimensions.experts
        if architecture.experts.shared:  # and its gate, which is whole on every rank
            shared = sparse * hidden * (3 * architecture.experts.shared // tensor + 1)
        experts = sparse * dimensions.experts * 3 * hidden * (architecture.experts.intermediate // tensor)
    rows = _padded_vocabulary(dimensions.vocabulary, tensor) // tensor
    return EngineShard(
        embedding=rows * hidden,
        output=0 if architecture.tied else rows * hidden,
        layers=dimensions.layers * attention + dense + shared + router + hidden,
        experts=experts,
        kv_values=2 * dimensions.layers * groups,
    )


def _padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """Rows of SGLang's tables over all ranks."""
    multiple = _VOCABULARY_MULTIPLE
    if -(-vocabulary // multiple) * multiple % tensor:
        multiple *= tensor
    return -(-vocabulary // multiple) * multiple


def _check(architecture: Architecture, tensor: int) -> None:
    dimensions = architecture.dimensions
    divided = [("attention heads", architecture.heads)]
    if len(dimensions.sparse_layers) < dimensions.layers:
        divided.append(("rows of the MLP", architecture.intermediate))
    if architecture.experts is not None:
        divided.append(("rows of an expert", architecture.experts.intermediate))
        divided.append(("rows of the shared expert", architecture.experts.shared))
    for what, size in divided:
        if size % tensor:
            raise ConfigError(
                f"engine.tensor = {tensor} does not divide the model's {size} {what} "
                f"(remainder {size % tensor})"
            )
    groups = dimensions.groups
    if max(groups, tensor) % min(groups, tensor):
        raise ConfigError(
            f"engine.tensor = {tensor} neither divides the model's {groups} key-value heads nor is a "
            "multiple of them"
        )
