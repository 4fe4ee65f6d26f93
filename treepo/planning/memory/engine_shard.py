"""What one rank of an SGLang 0.5.16 engine holds of a model: parameters and KV values.

Heads and the rows of every MLP are divided among the tensor-parallel ranks; experts are dealt out in
`engine.expert` parts, and their rows divided among the ranks of a part. Key-value heads are divided until
each rank has one, and replicated from there on. The vocabulary is padded to a multiple of 64 and divided;
norms and routers are whole on every rank. Layers are divided among the pipeline stages, the last of which
have one more if they do not divide evenly; the first stage has the embedding, the last the final norm and
the output.
SGLang's Qwen2-MoE and Qwen3-MoE have no dense layers; here they are counted as the model's configuration
says. SGLang's rotary tables (float32, positions x head size) count as runtime memory.
"""

from dataclasses import dataclass

from megatron_bridge.architecture import Architecture
from treepo.config.engine import EngineConfig
from treepo.errors import ConfigError

_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class EngineShard:
    """Parameters and KV values of one rank.

    embedding: the input table, of which a step reads one row a request. output: the output matrix, 0 if it is
    the embedding. layers: all else but the routed experts, which are `experts`. kv_values: numbers in the KV
    cache for one token.
    """

    embedding: int
    output: int
    layers: int
    experts: int
    kv_values: int

    @property
    def parameters(self) -> int:
        return self.embedding + self.output + self.layers + self.experts


def engine_shards(architecture: Architecture, engine: EngineConfig) -> list[EngineShard]:
    """A rank of each pipeline stage. Raises ConfigError if the ranks cannot share the model."""
    tensor, stages = engine.tensor, engine.pipeline
    _check(architecture, engine)
    dimensions, hidden = architecture.dimensions, architecture.hidden
    table = _padded_vocabulary(dimensions.vocabulary, tensor) // tensor * hidden
    shards, start = [], 0
    for stage in range(stages):
        stop = start + dimensions.layers // stages + (stage >= stages - dimensions.layers % stages)
        first, last = stage == 0, stage == stages - 1
        sparse = sum(layer in dimensions.sparse_layers for layer in range(start, stop))
        shards.append(
            EngineShard(
                embedding=table if first else 0,
                # If it is the embedding, the last of several stages has a copy.
                output=table if last and not (architecture.tied and first) else 0,
                layers=_dense_values(architecture, tensor, stop - start, sparse) + hidden * last,
                experts=_expert_values(architecture, tensor, sparse),
                kv_values=2 * (stop - start) * _groups(architecture, tensor) * dimensions.head_dim,
            )
        )
        start = stop
    return shards


def _dense_values(architecture: Architecture, tensor: int, layers: int, sparse: int) -> int:
    """Parameters of `layers` layers, of which `sparse` have experts, without the routed experts."""
    dimensions, hidden, family = architecture.dimensions, architecture.hidden, architecture.family
    size = dimensions.head_dim
    queries, groups = architecture.heads // tensor * size, _groups(architecture, tensor) * size
    attention = hidden * (2 * queries + 2 * groups) + 2 * hidden
    if family.qkv_bias:
        attention += queries + 2 * groups
    if family.qk_norm:
        attention += 2 * size
    if family.output_bias:
        attention += hidden
    values = layers * attention + (layers - sparse) * 3 * hidden * (architecture.intermediate // tensor)
    if architecture.experts is not None:
        values += sparse * hidden * dimensions.experts  # the router
        if architecture.experts.shared:  # and its gate, which is whole on every rank
            values += sparse * hidden * (3 * architecture.experts.shared // tensor + 1)
    return values


def _expert_values(architecture: Architecture, tensor: int, sparse: int) -> int:
    """Of the routed experts in `sparse` layers. However they are dealt out, a rank has as many rows."""
    if architecture.experts is None:
        return 0
    rows = architecture.dimensions.experts * architecture.experts.intermediate // tensor
    return sparse * 3 * architecture.hidden * rows


def _groups(architecture: Architecture, tensor: int) -> int:
    """Key-value heads of a rank."""
    return max(1, architecture.dimensions.groups // tensor)


def _padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """Rows of SGLang's tables over all ranks."""
    multiple = _VOCABULARY_MULTIPLE
    if -(-vocabulary // multiple) * multiple % tensor:
        multiple *= tensor
    return -(-vocabulary // multiple) * multiple


def _check(architecture: Architecture, engine: EngineConfig) -> None:
    dimensions, tensor, experts = architecture.dimensions, engine.tensor, architecture.experts
    divided = [("engine.tensor", tensor, "attention heads", architecture.heads)]
    if len(dimensions.sparse_layers) < dimensions.layers:
        divided.append(("engine.tensor", tensor, "rows of the MLP", architecture.intermediate))
    if experts is not None:
        divided += [
            ("engine.expert", engine.expert, "experts", dimensions.experts),
            (
                "engine.tensor / engine.expert",
                tensor // engine.expert,
                "rows of an expert",
                experts.intermediate,
            ),
            ("engine.tensor", tensor, "rows of the shared expert", experts.shared),
        ]
    for key, parts, what, size in divided:
        if size % parts:
            raise ConfigError(
                f"{key} = {parts} does not divide the model's {size} {what} (remainder {size % parts})"
            )
    if engine.expert > 1 and experts is None:
        raise ConfigError(f"engine.expert = {engine.expert}: the model has no experts")
    if engine.pipeline > dimensions.layers:
        raise ConfigError(
            f"engine.pipeline = {engine.pipeline} is more than the model's {dimensions.layers} layers"
        )
    groups = dimensions.groups
    if max(groups, tensor) % min(groups, tensor):
        raise ConfigError(
            f"engine.tensor = {tensor} neither divides the model's {groups} key-value heads nor is a "
            "multiple of them"
        )
