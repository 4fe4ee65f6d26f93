"""Memory of the trainer: of every pipeline stage's ranks at their fullest, of its host, of its checkpoints.

Parameters are counted from the real model, built without memory (`megatron_bridge.layout_shards`). What belongs to
a parameter follows from `megatron_bridge.optimizer`: gradients summed in float32; Adam's moments and, of other
dtypes, a float32 master copy, divided among the replicas that hold the parameter. Activations are those of
`treepo.planning.activations`, for the pipeline schedules of Megatron-Core. Units: bytes.

Compared with real ranks on CPU in tests/planning/test_memory.py; for CUDA see `treepo.planning.activations`. Not
in it: what the allocator loses between blocks; the context of a GPU and of NCCL (1 to 2 GiB); the optimizer's
own step, when activations have gone (Transformer Engine's Adam works in place, but torch's, where that is not
installed, takes some further bytes for each value of a rank's share).
"""

from functools import cache
from math import ceil, prod
from pathlib import Path

from megatron_bridge.architecture import Architecture, read_architecture
from megatron_bridge.hf_weight_map import EMBEDDING
from megatron_bridge.layout_shards import (
    Shard,
    buffer_elements,
    expert_data_ranks,
    layout_shards,
    tensor_shapes,
)
from treepo.config.run import RunConfig
from treepo.config.trainer import ParallelConfig
from treepo.planning import activations
from treepo.planning.activations import FLOAT32, MicroBatch
from treepo.planning.memory import Memory, element_bytes
from treepo.planning.update_memory import update_memory


def parameters(folder: Path) -> int:
    """Of the whole model, each once: what transformers counts."""
    return sum(map(prod, tensor_shapes(read_architecture(folder)).values()))


def trainer_memory(config: RunConfig, folder: Path) -> list[Memory]:
    """One rank of each pipeline stage, when its training step is at its fullest; ranks of a stage are alike.
    Last rank 0 in a weight update, when no activations are held.

    Raises ConfigError where the layout does not divide the model.
    """
    architecture, shards = read_architecture(folder), stage_shards(folder, config.trainer.parallel)
    batch = largest_micro_batch(config, architecture)
    stages = [_stage(config, batch, shard) for shard in shards]
    first = Memory("", *state(config, shards[0]))
    return [*stages, update_memory(config, architecture, shards, first)]


def stage_shards(folder: Path, parallel: ParallelConfig) -> tuple[Shard, ...]:
    """`layout_shards`, built once for each layout."""
    return _stage_shards(folder, parallel)  # type: ignore[reportArgumentType]  # frozen, hence hashable


@cache
def _stage_shards(folder: Path, parallel: ParallelConfig) -> tuple[Shard, ...]:
    return tuple(layout_shards(read_architecture(folder), parallel))


def largest_micro_batch(config: RunConfig, architecture: Architecture) -> MicroBatch:
    """A pack as full as they may be, all of its responses as long as they may be and branching early."""
    parallel, tokens = config.trainer.parallel, config.trainer.max_tokens_per_pack
    if parallel.sequence_parallel:
        tokens += -tokens % parallel.tensor
    context = config.data.max_prompt_tokens + config.sampling.max_response_tokens / 2
    return MicroBatch(
        architecture,
        config.trainer,
        tokens,
        min(context, tokens),
        element_bytes(config),
        eager=config.plan.device == "cpu",
    )


def _stage(config: RunConfig, batch: MicroBatch, shard: Shard) -> Memory:
    parallel = config.trainer.parallel
    parts, notes = state(config, shard)
    kept = _kept(batch, shard, parallel)
    in_flight = micro_batches_in_flight(parallel, shard.stage)
    parts["activations"] = in_flight * kept + _kept_of_the_one_before(batch, parallel, shard)
    notes["activations"] = (
        f"{in_flight:g} micro-batches of {batch.tokens} tokens, recompute {batch.trainer.recompute}"
    )
    work, scores = work_in_layers(batch, shard), work_on_logits(config, batch, shard)
    parts["layer in work"] = work if work >= scores else 0.0
    parts["logits"] = scores if work < scores else 0.0
    lesser, greater = ("logits", "layer in work") if work >= scores else ("layer in work", "logits")
    if scores:
        notes[lesser] = f"{min(work, scores) / 2**30:.2f} GiB, not at the same time as {greater}"
    parts["gather buffer"] = batch.whole if parallel.sequence_parallel else 0.0
    notes["gather buffer"] = "all tokens' hidden states, for matrices whose input is divided"
    parts["tree packs"] = packs_in_flight(parallel, shard.stage) * activations.pack(batch)
    notes["tree packs"] = "fields, rotary angles, block mask"
    return Memory(f"trainer, pipeline stage {shard.stage}", parts, notes)


def state(config: RunConfig, shard: Shard) -> tuple[dict[str, float], dict[str, str]]:
    """Weights, gradients and optimizer of one rank, with their notes."""
    parallel, element = config.trainer.parallel, element_bytes(config)
    held = optimizer = 0
    for chunk in shard.chunks:
        for expert, ranks in ((False, parallel.data), (True, expert_data_ranks(parallel))):
            elements = buffer_elements([each for each in chunk if each.expert == expert], ranks)
            held += elements
            optimizer += elements // ranks
    values = optimizer_values(config)
    parts: dict[str, float] = {
        "weights": element * held,
        "gradients": FLOAT32 * held,
        "optimizer": FLOAT32 * values * optimizer,
    }
    notes = {
        "weights": f"{shard.elements():,} parameters x {element}",
        "gradients": "float32",
        "optimizer": f"{optimizer:,} of them on each replica x {FLOAT32 * values}",
    }
    return parts, notes


def optimizer_values(config: RunConfig) -> int:
    """Float32 values for each parameter: two moments, and a master copy where the parameter is no float32."""
    return 2 if element_bytes(config) == FLOAT32 else 3


def _layers(shard: Shard) -> set[int]:
    """The layers of a stage, counted over the whole model."""
    names = (each.name.split(".") for each in shard.parameters)
    return {int(name[2]) for name in names if name[:2] == ["decoder", "layers"]}


def _kept(batch: MicroBatch, shard: Shard, parallel: ParallelConfig) -> float:
    """By one micro-batch on all layers of the stage, with what it sent on."""
    sparse = batch.architecture.dimensions.sparse_layers
    kept = sum(activations.layer_kept(batch, layer in sparse) for layer in _layers(shard))
    if shard.stage < parallel.pipeline - 1:
        kept += batch.stream * parallel.virtual_pipeline
    return kept


def _kept_of_the_one_before(batch: MicroBatch, parallel: ParallelConfig, shard: Shard) -> float:
    """The last of several stages holds on to what it received and sent back, until the next loss is there."""
    return 2 * batch.stream if 0 < shard.stage == parallel.pipeline - 1 else 0.0


def work_in_layers(batch: MicroBatch, shard: Shard) -> float:
    """The most beyond `_kept` in the backward pass. Tied embeddings that are on one rank have their output's
    gradient until their input's is there. Experts hold on to the scores by which they were chosen,
    and so to the input of a layer that was computed again, and its gradient, until the next micro-batch.
    """
    layers, sparse = _layers(shard), set(batch.architecture.dimensions.sparse_layers)
    work = max(activations.layer_work(batch, layer in sparse) for layer in layers)
    held = max(0, len(layers & sparse) - 1) if batch.trainer.recompute == "full" else 0
    tied = batch.architecture.tied and batch.trainer.parallel.pipeline == 1
    gradient = sum(each.elements for each in shard.parameters if tied and each.name == EMBEDDING)
    return work + held * batch.stream + gradient * batch.element


def work_on_logits(config: RunConfig, batch: MicroBatch, shard: Shard) -> float:
    """The most beyond `_kept` from the last layer to the loss and back; 0 but on the last stage."""
    if shard.stage < config.trainer.parallel.pipeline - 1:
        return 0.0
    with_gradient = config.learning.entropy_coefficient > 0
    return activations.after_layers(batch) + activations.logits(batch, with_gradient)


def micro_batches_in_flight(parallel: ParallelConfig, stage: int) -> float:
    """Whose activations a stage holds at once, where there are at least as many as stages: under 1F1B those
    that later stages have not sent back; interleaved, chunks of micro-batches count as parts of them.
    """
    behind = parallel.pipeline - 1 - stage
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return behind + 1
    return (2 * behind + (chunks - 1) * parallel.pipeline + 1) / chunks


def packs_in_flight(parallel: ParallelConfig, stage: int) -> int:
    """Micro-batches of which a stage holds the pack: also those that only one of its chunks has had, and on
    the last of several stages the one before.
    """
    return ceil(micro_batches_in_flight(parallel, stage)) + (0 < stage == parallel.pipeline - 1)
