"""What every rank of a layout would hold: the real Megatron-Core model, built without memory or other ranks.

A fake process group of the layout's size stands in for the ranks, up to thousands of them; the model is on
torch's meta device. A rank's parameters have shapes that depend on its pipeline stage alone, because all that
is divided divides evenly (`check_layout`; the vocabulary is padded): tensor- and expert-parallel ranks of a
stage differ in the values and in which experts they hold. So each stage is built at its first and its last
rank, the one must be what the other says it is, and the rest follows by counting experts on.
"""

import megatron_bridge.quiet  # noqa: F401  # isort: skip  # before anything of Megatron-Core

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import lcm, prod

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bridge.architecture import Architecture, check_layout
from megatron_bridge.device import on_device
from megatron_bridge.groups import form_groups
from megatron_bridge.model import named_parameters, outlines
from megatron_bridge.weights import Rule, Surgery, expand
from treepo.config.trainer import ParallelConfig, TrainerConfig
from treepo.errors import ModelError

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True)
class ShardParameter:
    """One rank's part of a parameter. name: as in the families' tables. expert: whether it is an expert's."""

    name: str
    shape: tuple[int, ...]
    expert: bool

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """What the ranks of one pipeline stage hold. chunks: the parameters of each of its model chunks.

    Experts are those of the stage's first expert-parallel rank; the others hold as many that follow.
    """

    stage: int
    chunks: tuple[tuple[ShardParameter, ...], ...]

    @property
    def parameters(self) -> Iterator[ShardParameter]:
        return (parameter for chunk in self.chunks for parameter in chunk)

    def elements(self, expert: bool | None = None) -> int:
        """Of all parameters, or of those that are (not) experts'."""
        return sum(each.elements for each in self.parameters if expert in (None, each.expert))


def expert_data_ranks(parallel: ParallelConfig) -> int:
    """How many ranks hold the same experts; their optimizer state is divided among them."""
    return parallel.tensor * parallel.data // parallel.expert


def layout_shards(architecture: Architecture, parallel: ParallelConfig) -> list[Shard]:
    """One for each pipeline stage, checked to be the whole model together.

    Raises ConfigError where the layout does not divide the model, ModelError where shards are not what the
    families' tables say. No process group may exist; none is left behind.
    """
    check_layout(architecture, parallel)
    shards = []
    ranks = parallel.tensor * parallel.data  # of one stage
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
    """As `rank` among all ranks of the layout. Their collectives do nothing."""
    assert not dist.is_initialized(), "a fake process group would hide the real one"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.ranks)
    try:
        form_groups(parallel, with_gloo=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _built(architecture: Architecture, parallel: ParallelConfig, stage: int, rank: int) -> Shard:
    with fake_ranks(parallel, rank):
        chunks = outlines(architecture, torch.bfloat16, TrainerConfig(parallel=parallel))
        return Shard(
            stage,
            tuple(
                tuple(
                    ShardParameter(name, tuple(parameter.shape), not getattr(parameter, "allreduce", True))
                    for name, parameter in named_parameters([chunk]).items()
                )
                for chunk in chunks
            ),
        )


def _check_last(first: Shard, last: Shard, architecture: Architecture, parallel: ParallelConfig) -> None:
    """Whether the stage's last rank holds what its first says it does."""
    renamed = _names_at(first, parallel.expert - 1, architecture, parallel)
    expected = [(renamed[each.name], each.shape) for each in first.parameters]
    if expected != [(each.name, each.shape) for each in last.parameters]:
        raise ModelError(
            f"the first and the last rank of pipeline stage {first.stage} hold unlike parameters"
        )


def _names_at(
    shard: Shard, expert_rank: int, architecture: Architecture, parallel: ParallelConfig
) -> dict[str, str]:
    """The shard's names to those of the same parameters on another expert-parallel rank."""
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
    """Raises ModelError unless the shards, joined as the weights are for the engines, are every Hugging Face
    tensor exactly once; of tied embeddings the last of several stages has a copy.
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
                    f"pipeline stage {shard.stage} has {name} {shape}; of the model "
                    + (f"it is {expected[name]}, once" if name in expected else "it is no tensor")
                )
    if missing:
        raise ModelError(f"no rank has {next(iter(missing))}, nor {len(missing) - 1} other tensors")
    if architecture.tied and copies != (len(shards) > 1):
        raise ModelError("the last pipeline stage has no copy of the embedding, to which it is tied")


def _joined(
    shard: Shard, rules: dict[str, Rule], architecture: Architecture, parallel: ParallelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The Hugging Face tensors that the stage's ranks hold together: their names and shapes."""

    @cache  # layers and experts are alike
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


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The model's Hugging Face tensors, each once, as transformers has them; without Megatron-Core."""
    dimensions, hidden = architecture.dimensions, architecture.hidden
    queries, keys = architecture.heads * dimensions.head_dim, dimensions.groups * dimensions.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate": dimensions.experts}
    rows |= dict.fromkeys(("embed_tokens", "lm_head"), dimensions.vocabulary)
    norms = {"q_norm": dimensions.head_dim, "k_norm": dimensions.head_dim}

    def shape(name: str) -> tuple[int, ...]:
        *path, module, kind = name.split(".")
        if "norm" in module:
            return (norms.get(module, hidden),)
        of_expert = architecture.experts is not None and "experts" in path
        inner = architecture.experts.intermediate if of_expert else architecture.intermediate  # type: ignore[union-attr]  # as asked
        if module in ("o_proj", "down_proj"):
            return (hidden, queries if module == "o_proj" else inner)
        out = rows.get(module, inner)
        return (out,) if kind == "bias" else (out, hidden)

    names = (
        name
        for rule in expand(architecture.family.rules, dimensions)
        for name in rule.tensors
        if not (architecture.tied and name == "lm_head.weight")
    )
    return {name: shape(name) for name in names}


def buffer_elements(chunk: Sequence[ShardParameter], ranks: int) -> int:
    """Of the buffer in which Megatron-Core keeps these parameters, or their gradients: each parameter begins
    at a multiple of 64, and the whole divides among the `ranks` that share the optimizer's state.
    """
    used = 0
    for parameter in reversed(chunk):
        used = _rounded_up(used, 64) + parameter.elements
    return _rounded_up(used, lcm(ranks, 128))


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
