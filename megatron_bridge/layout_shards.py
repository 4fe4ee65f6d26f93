"""Lists the parameters that every rank of a layout would hold, without memory and without the other ranks.

The real Megatron-Core model is built on torch's meta device. A fake process group of the layout's size, up to
thousands of ranks, stands in for the other ranks. The shapes of a rank's parameters depend on its pipeline
stage alone, because everything that is divided divides evenly (`check_layout`; the vocabulary is padded):
tensor- and expert-parallel ranks of a stage differ in values and in which experts they hold. So each stage is
built at its first and at its last rank and the two are compared. The ranks between hold the same parameters,
but experts with other numbers.
"""

import megatron_bridge.runtime  # noqa: F401  # isort: skip  # before anything of Megatron-Core

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import lcm, prod

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bridge.architecture import Architecture, check_layout, tensor_shapes
from megatron_bridge.hf_weight_map import Rule, expand
from megatron_bridge.model import build_outline, is_expert, named_parameters
from megatron_bridge.process_groups import form_groups, leave_groups
from megatron_bridge.runtime import on_device
from megatron_bridge.tensor_surgery import Surgery
from treepo.config.trainer import ParallelConfig, TrainerConfig
from treepo.errors import ModelError


@dataclass(frozen=True, slots=True)
class ShardParameter:
    """One rank's part of a parameter. name: as in the families' tables. expert: whether an expert has it."""

    name: str
    shape: tuple[int, ...]
    expert: bool

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """The parameters of one rank of a pipeline stage. chunks: those of each of its model chunks.

    The experts are those of the stage's first expert-parallel rank; each further rank holds as many further
    experts.
    """

    stage: int
    chunks: tuple[tuple[ShardParameter, ...], ...]

    @property
    def parameters(self) -> Iterator[ShardParameter]:
        return (parameter for chunk in self.chunks for parameter in chunk)

    def elements(self, expert: bool | None = None) -> int:
        """The number of values; `expert` counts only those of experts (True) or of the rest (False)."""
        return sum(each.elements for each in self.parameters if expert in (None, each.expert))


def expert_data_ranks(parallel: ParallelConfig) -> int:
    """The number of ranks that hold the same experts; the experts' optimizer state is divided among them."""
    return parallel.stage_ranks // parallel.expert


def layout_shards(architecture: Architecture, parallel: ParallelConfig) -> list[Shard]:
    """One shard for each pipeline stage, checked to be the whole model together.

    Raises ConfigError if the layout does not divide the model, ModelError if the shards contradict the
    families' tables. No process group may exist; none is left behind.
    """
    check_layout(architecture, parallel)
    shards = []
    ranks = parallel.stage_ranks
    with on_device(), torch.random.fork_rng(devices=[]):
        for stage in range(parallel.pipeline):
            first = _built(architecture, parallel, stage, stage * ranks)
            if ranks > 1:
                last = _built(architecture, parallel, stage, stage * ranks + ranks - 1)
                _check_last(first, last, architecture, parallel)
            shards.append(first)
    check_shards(shards, architecture, parallel)
    return shards


@contextmanager
def fake_ranks(parallel: ParallelConfig, rank: int) -> Iterator[None]:
    """While the body runs, this process is `rank` among all ranks of the layout; collectives do nothing."""
    assert not dist.is_initialized(), "a fake process group would hide the real one"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.ranks)
    try:
        form_groups(parallel, with_gloo=False)
        yield
    finally:
        leave_groups()


def _built(architecture: Architecture, parallel: ParallelConfig, stage: int, rank: int) -> Shard:
    with fake_ranks(parallel, rank):
        chunks = build_outline(architecture, torch.bfloat16, TrainerConfig(parallel=parallel))
        return Shard(
            stage,
            tuple(
                tuple(
                    ShardParameter(name, tuple(parameter.shape), is_expert(parameter))
                    for name, parameter in named_parameters([chunk]).items()
                )
                for chunk in chunks
            ),
        )


def _check_last(first: Shard, last: Shard, architecture: Architecture, parallel: ParallelConfig) -> None:
    """Check that the stage's last rank holds the parameters that follow from its first rank's."""
    renamed = _names_at(first, parallel.expert - 1, architecture, parallel)
    expected = [(renamed[each.name], each.shape) for each in first.parameters]
    if expected != [(each.name, each.shape) for each in last.parameters]:
        raise ModelError(
            f"the first and the last rank of pipeline stage {first.stage} hold different parameters"
        )


def _names_at(
    shard: Shard, expert_rank: int, architecture: Architecture, parallel: ParallelConfig
) -> dict[str, str]:
    """Map the shard's names to the names of the same parameters on another expert-parallel rank."""
    shift = expert_rank * (architecture.dimensions.experts // parallel.expert)
    return {
        each.name: _with_expert_shifted(each.name, shift) if each.expert else each.name
        for each in shard.parameters
    }


def _with_expert_shifted(name: str, shift: int) -> str:
    before, middle, after = name.partition(".local_experts.")
    expert, dot, rest = after.partition(".")
    return f"{before}{middle}{int(expert) + shift}{dot}{rest}"


def check_shards(shards: Sequence[Shard], architecture: Architecture, parallel: ParallelConfig) -> None:
    """Check that the shards, joined as for the engines, are every Hugging Face tensor exactly once.

    The last of several stages has a copy of tied embeddings. Raises ModelError.
    """
    rules = {rule.parameter: rule for rule in expand(architecture.family.rules, architecture.dimensions)}
    expected = tensor_shapes(architecture)
    missing = dict(expected)
    copies = 0
    for shard in shards:
        for name, shape in _joined(shard, rules, architecture, parallel):
            if architecture.tied and name == "lm_head.weight":
                copies += 1
                name = "model.embed_tokens.weight"
                if shard.stage != len(shards) - 1 or len(shards) == 1 or shape != expected[name]:
                    raise ModelError(f"pipeline stage {shard.stage} has a copy of the embedding {shape}")
            elif missing.pop(name, None) != shape:
                raise ModelError(
                    f"pipeline stage {shard.stage} has {name} {shape}; the model has "
                    + (f"it once, as {expected[name]}" if name in expected else "no such tensor")
                )
    if missing:
        raise ModelError(f"no rank has {next(iter(missing))}, nor {len(missing) - 1} other tensors")
    if architecture.tied and copies != (len(shards) > 1):
        raise ModelError("the last pipeline stage has no copy of the embedding, to which its output is tied")


def _joined(
    shard: Shard, rules: dict[str, Rule], architecture: Architecture, parallel: ParallelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the Hugging Face tensors that the stage's ranks hold together."""

    @cache  # layers and experts repeat
    def joined(surgery: Surgery, shape: tuple[int, ...], pieces: int) -> list[tuple[int, ...]]:
        piece = torch.empty(shape, device="meta")
        return [tuple(tensor.shape) for tensor in surgery.join([piece] * pieces, architecture.dimensions)]

    for expert_rank in range(parallel.expert):
        names = _names_at(shard, expert_rank, architecture, parallel)
        for parameter in shard.parameters:
            if expert_rank and not parameter.expert:
                continue
            rule = rules[names[parameter.name]]
            pieces = 1 if parameter.expert or rule.surgery.replicated else parallel.tensor
            yield from zip(rule.tensors, joined(rule.surgery, parameter.shape, pieces), strict=True)


def buffer_elements(chunk: Sequence[ShardParameter], ranks: int) -> int:
    """The length of Megatron-Core's buffer for these parameters or their gradients.

    Each parameter begins at a multiple of 64, and the buffer divides among the `ranks` that share the
    optimizer state.
    """
    used = 0
    for parameter in reversed(chunk):
        used = _rounded_up(used, 64) + parameter.elements
    return _rounded_up(used, lcm(ranks, 128))


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
