"""Trainer memory: ranks of every pipeline stage at their peak, rank 0 in a weight sync, a checkpoint.

Parameters are counted on the real model, built without memory (`megatron_bridge.layout_shards`). Gradients
are summed in float32. Adam's two averages and, unless the model is float32, a float32 master copy are divided
among the replicas that hold a parameter (`megatron_bridge.optimizer`). Activations follow Megatron-Core's
pipeline schedules. Units: bytes.

Compared with real ranks on CPU in tests/planning/test_memory.py. Not counted: memory that the allocator loses
between blocks; CUDA's and NCCL's context (`fit.RUNTIME`). The optimizer steps in place.
"""

from functools import cache
from math import ceil, prod
from pathlib import Path

from megatron_bridge.architecture import Architecture, tensor_shapes
from megatron_bridge.attention import CPU_BLOCK, CUDA_BLOCK
from megatron_bridge.hf_weight_map import EMBEDDING
from megatron_bridge.layout_shards import (
    Shard,
    buffer_elements,
    expert_data_ranks,
    layout_shards,
)
from megatron_bridge.tensor_surgery import padded_vocabulary
from treepo.config.run import RunConfig
from treepo.config.trainer import ParallelConfig
from treepo.learning.slicing import block_size, sliced_length
from treepo.planning.architecture import planned_architecture
from treepo.planning.memory import activations, routes
from treepo.planning.memory.activations import MicroBatch
from treepo.planning.memory.adapters import adapter_count, adapters_of
from treepo.planning.memory.parts import FLOAT32, Memory, Parts, element_bytes
from treepo.planning.memory.weight_sync import sync_memory


def parameter_count(folder: Path) -> int:
    """Parameters of the whole model, each once: transformers' count."""
    return sum(map(prod, tensor_shapes(planned_architecture(folder)).values()))


def trainer_memory(config: RunConfig, folder: Path, shared: bool = False) -> list[Memory]:
    """One rank of each pipeline stage at the peak of a training step, then rank 0 in a weight sync.

    shared: whether engines use the devices; then gradients and what is offloaded have gone before a sync, but
    not the weights. Ranks of a stage are alike; in a sync no activations are held. Raises ConfigError if the
    layout does not divide the model.
    """
    architecture, shards = planned_architecture(folder), stage_shards(folder, config.trainer.parallel)
    batch = largest_micro_batch(config, architecture)
    stages = [_stage(config, batch, shard) for shard in shards]
    held = _state(config, architecture, shards[0])
    if shared:
        held = {name: held[name] for name in held if name in {"weights", *kept_while_sampling(config)}}
    return [*stages, sync_memory(config, architecture, shards, held)]


def kept_while_sampling(config: RunConfig) -> tuple[str, ...]:
    """The parts of the state that stay on devices which engines share: gradients never do."""
    return tuple(part for part in ("weights", "optimizer") if part not in offloaded(config))


def offloaded(config: RunConfig) -> tuple[str, ...]:
    """The parts of the state that `trainer.offload` moves to the host while engines sample."""
    return {"none": (), "optimizer": ("optimizer",), "all": ("weights", "optimizer")}[config.trainer.offload]


def offloaded_bytes(config: RunConfig, folder: Path) -> float:
    """What a rank of the largest stage moves to the host."""
    stages = trainer_memory(config, folder)[:-1]
    return max(stage.subtotal(offloaded(config)) for stage in stages)


def packs_of_step(config: RunConfig, folder: Path, tree_tokens: float) -> float:
    """All packs of a replica's trees, which are on the device from a step's log-probs to its last optimizer
    step (`megatron_bridge.trainer`). tree_tokens: expected of one tree.
    """
    batch = largest_micro_batch(config, planned_architecture(folder))
    trees = config.data.prompts_per_step / config.trainer.parallel.data
    sparse = len(batch.architecture.dimensions.sparse_layers)
    pack = activations.pack(batch) + routes.on_device(batch, ceil(sparse / config.trainer.parallel.pipeline))
    return trees * tree_tokens / batch.pack_tokens * pack


def checkpoint_bytes(config: RunConfig, folder: Path) -> float:
    """One training checkpoint: weights and optimizer state, with the vocabulary's padding; of adapters alone,
    if those are trained.
    """
    architecture = planned_architecture(folder)
    if config.trainer.lora is not None:
        return adapter_count(architecture, config.trainer.lora) * (
            element_bytes(config) + optimizer_bytes(config)
        )
    vocabulary = architecture.dimensions.vocabulary
    padding = padded_vocabulary(vocabulary, config.trainer.parallel.tensor) - vocabulary
    written = parameter_count(folder) + padding * architecture.hidden * (1 if architecture.tied else 2)
    return written * (element_bytes(config) + optimizer_bytes(config))


def optimizer_bytes(config: RunConfig) -> int:
    """Optimizer state of one parameter: two averages, and a master copy unless the parameter is float32."""
    return FLOAT32 * (2 if element_bytes(config) == FLOAT32 else 3)


def stage_shards(folder: Path, parallel: ParallelConfig) -> tuple[Shard, ...]:
    """`layout_shards`, built once for each layout."""
    return _stage_shards(folder, parallel)  # type: ignore[reportArgumentType]  # frozen, hence hashable


@cache
def _stage_shards(folder: Path, parallel: ParallelConfig) -> tuple[Shard, ...]:
    return tuple(layout_shards(planned_architecture(folder), parallel))


def largest_micro_batch(config: RunConfig, architecture: Architecture) -> MicroBatch:
    """A full pack whose responses are as long as allowed and branch early."""
    parallel, tokens = config.trainer.parallel, config.trainer.max_tokens_per_pack
    on_cpu = config.plan.device == "cpu"
    blocks = (1, CPU_BLOCK) if on_cpu else (CUDA_BLOCK, CUDA_BLOCK)
    block = block_size(tokens, parallel.context, *blocks)
    tokens = sliced_length(tokens, parallel.context, block, parallel.sequence_multiple)
    context = config.data.max_prompt_tokens + config.sampling.max_response_tokens / 2
    return MicroBatch(
        architecture,
        config.trainer,
        tokens,
        tokens // parallel.context,
        min(context, tokens),
        element_bytes(config),
        eager=on_cpu,
    )


def _stage(config: RunConfig, batch: MicroBatch, shard: Shard) -> Memory:
    parallel = config.trainer.parallel
    in_flight = _micro_batches_in_flight(parallel, shard.stage)
    kept = in_flight * _kept(batch, shard, parallel)
    last_of_several = 0 < shard.stage == parallel.pipeline - 1
    if last_of_several:  # it holds what it received and sent back until the next loss is computed
        kept += 2 * batch.stream
    work, logits = work_in_layers(batch, shard), work_on_logits(config, batch, shard)
    lesser = f"{min(work, logits) / 2**30:.2f} GiB, not at the same time as " if logits else ""
    return Memory(
        f"trainer, pipeline stage {shard.stage}",
        {
            **_state(config, batch.architecture, shard),
            "activations": (
                kept,
                f"{in_flight:g} micro-batches of {batch.tokens} tokens"
                + (f", a slice of {batch.pack_tokens}" if batch.slices > 1 else "")
                + f", recompute {batch.trainer.recompute}",
            ),
            "layer in work": (work, "") if work >= logits else (0.0, lesser + "logits"),
            "logits": (logits, "") if work < logits else (0.0, lesser and lesser + "layer in work"),
            "gather buffer": (
                batch.gather_buffer,
                "all tokens' hidden states, for matrices whose input is divided",
            ),
            # Packs that only some of its chunks have had too, and on the last stage the one before.
            "tree packs": (
                (ceil(in_flight) + last_of_several) * _pack(batch, shard),
                "fields, rotary angles, block mask"
                + (", routes" if config.trainer.routing_replay != "none" else ""),
            ),
        },
    )


def _state(config: RunConfig, architecture: Architecture, shard: Shard) -> Parts:
    """Weights, gradients and optimizer state of one rank. Frozen weights have neither of the latter."""
    parallel, element, lora = config.trainer.parallel, element_bytes(config), config.trainer.lora
    held = owned = 0
    for chunk in shard.chunks:
        if lora is not None:
            chunk = adapters_of(chunk, architecture, parallel, lora)
        owners = (False, parallel.data * parallel.context), (True, expert_data_ranks(parallel))
        for expert, ranks in owners:
            elements = buffer_elements([each for each in chunk if each.expert == expert], ranks)
            held += elements
            owned += elements // ranks
    state = optimizer_bytes(config)
    frozen = 0 if lora is None else shard.elements()
    beside = "" if lora is None else f", and adapters of {held:,}"
    return {
        "weights": (element * (frozen + held), f"{shard.elements():,} parameters x {element}{beside}"),
        "gradients": (FLOAT32 * held, "float32"),
        "optimizer": (state * owned, f"{owned:,} of them on each rank that holds them x {state}"),
    }


def _layers(shard: Shard) -> set[int]:
    """A stage's layers, numbered over the whole model."""
    names = (each.name.split(".") for each in shard.parameters)
    return {int(name[2]) for name in names if name[:2] == ["decoder", "layers"]}


def _pack(batch: MicroBatch, shard: Shard) -> float:
    """A micro-batch's fields, plan and routes."""
    sparse = _layers(shard) & set(batch.architecture.dimensions.sparse_layers)
    return activations.pack(batch) + routes.on_device(batch, len(sparse))


def _kept(batch: MicroBatch, shard: Shard, parallel: ParallelConfig) -> float:
    """Kept of one micro-batch by all layers of the stage, with the output sent to the next stage."""
    sparse = batch.architecture.dimensions.sparse_layers
    kept = sum(activations.layer_kept(batch, layer in sparse) for layer in _layers(shard))
    if shard.stage < parallel.pipeline - 1:
        kept += batch.stream * parallel.virtual_pipeline
    return kept


def work_in_layers(batch: MicroBatch, shard: Shard) -> float:
    """The most beyond kept activations in the layers' backward pass.

    Tied embeddings on one rank have their output's gradient until their input's is computed. With full
    recomputation, experts hold the router's output, and so the input of a recomputed layer and its gradient,
    until the next micro-batch.
    """
    layers, sparse = _layers(shard), set(batch.architecture.dimensions.sparse_layers)
    work = max(activations.layer_work(batch, layer in sparse) for layer in layers)
    held = max(0, len(layers & sparse) - 1) if batch.trainer.recompute == "full" else 0
    tied = batch.architecture.tied and batch.trainer.parallel.pipeline == 1 and batch.trainer.lora is None
    gradient = sum(each.elements for each in shard.parameters if tied and each.name == EMBEDDING)
    return work + held * batch.stream + gradient * batch.element


def work_on_logits(config: RunConfig, batch: MicroBatch, shard: Shard) -> float:
    """The most beyond kept activations from the last layer to the loss and back; 0 before the last stage."""
    if shard.stage < config.trainer.parallel.pipeline - 1:
        return 0.0
    return activations.after_layers(batch) + activations.logits(batch)


def _micro_batches_in_flight(parallel: ParallelConfig, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, if there are at least as many as stages.

    1F1B: those that later stages have not sent back. Interleaved: chunks of micro-batches count as fractions.
    """
    behind = parallel.pipeline - 1 - stage
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return behind + 1
    return (2 * behind + (chunks - 1) * parallel.pipeline + 1) / chunks
