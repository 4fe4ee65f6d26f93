"""The stages of first_day.py that need Megatron-Core but no engine.

Log-probs are compared with float32; process groups, checkpoints and offloading by what comes back.
"""

import megatron_bridge.runtime  # noqa: F401  # isort: skip  # before anything of Megatron-Core

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.cuda import nccl
from transformers import Qwen2ForCausalLM

from benchmarks.gpu import train_step
from benchmarks.gpu.stage_process import Context, Figures
from benchmarks.gpu.train_step import by_token, difference
from benchmarks.packed_and_flat import Setting, Work, work
from benchmarks.random_model import SHAPES, write_model
from megatron_bridge.process_groups import form_groups, leave_groups
from megatron_bridge.runtime import on_device
from megatron_bridge.trainer import MegatronTrainer, create_store
from treepo.config.learning import LearningConfig
from treepo.config.log_prob_check import MAX_LIMITS, MEAN_LIMITS
from treepo.config.trainer import ParallelConfig, TrainerConfig
from treepo.doctor import trainer_check
from treepo.doctor.check import Status
from treepo.learning.packing import Pack
from treepo.weight_sync.broadcast import form_group, leave_group
from treepo.weight_sync.listening_store import listening_store

SECONDS = 60.0
KEPT_SHARE = 0.25
"""Of the memory before an offload of everything."""
SAME_STEP = 0.1
"""A step without the optimizer's state differs by about 1: Adam's first steps are the largest."""

_CUDA = torch.cuda.is_available()
_DEVICE = torch.device("cuda" if _CUDA else "cpu")
_SMALL = SHAPES["0.5b"] | {"num_hidden_layers": 8, "vocab_size": 32768}  # a checkpoint of 2.5 GB


def groups(_: Context) -> Figures:
    """Collectives in every group that Megatron-Core forms, over NCCL (gloo on a CPU), at world size 1."""
    with on_device():
        backend = "cpu:gloo,cuda:nccl" if _CUDA else "gloo"
        dist.init_process_group(backend, store=create_store(), rank=0, world_size=1)
        form_groups(ParallelConfig())
        collection = ProcessGroupCollection.use_mpu_process_groups()
        formed = {field.name: getattr(collection, field.name, None) for field in fields(collection)}
        one_by_one = {name: group for name, group in formed.items() if isinstance(group, dist.ProcessGroup)}
        seconds = {name: _collectives(group) for name, group in one_by_one.items()}
        leave_groups()
    version = ".".join(map(str, nccl.version())) if _CUDA else None
    return {
        "headline": f"{len(seconds)} groups, {'NCCL ' + version if version else 'gloo'}",
        "nccl": version,
        "seconds": seconds,
    }


def _collectives(group: dist.ProcessGroup) -> float:
    """Seconds of the first collectives, which open the group's communicator."""
    start = time.perf_counter()
    x = torch.arange(1024, device=_DEVICE, dtype=torch.float32)
    total, part, whole = x.clone(), torch.empty_like(x), torch.empty_like(x)
    dist.all_reduce(total, group=group)
    dist.reduce_scatter_tensor(part, x, group=group)
    dist.all_gather_into_tensor(whole, x, group=group)
    dist.broadcast(x, dist.get_rank(), group=group)
    for result in (total, part, whole):
        assert torch.equal(result, x), "a collective of one rank changed its values"
    return time.perf_counter() - start


def broadcast_group(_: Context) -> Figures:
    """The group of `weights.transport: broadcast`, formed and left twice. NCCL takes one process a GPU, so it
    has the sender alone.
    """
    store = listening_store("127.0.0.1", timedelta(seconds=SECONDS))
    start = time.perf_counter()
    for again in range(2):
        group = form_group(store, f"group {again}", 0, 1, SECONDS, _DEVICE)
        flat = torch.full((1 << 20,), 7, dtype=torch.uint8, device=_DEVICE)
        group.broadcast([flat], torch.distributed.BroadcastOptions()).wait(timedelta(seconds=SECONDS))
        assert bool((flat == 7).all()), "a broadcast of one rank changed its bytes"
        leave_group(group)
    seconds = time.perf_counter() - start
    return {"headline": f"formed and left twice in {seconds:.2f} s", "seconds": seconds}


def trainer_bf16(_: Context) -> Figures:
    """The check `trainer` of `treepo doctor`, which computes in bfloat16 on a GPU."""
    torch._dynamo.reset()
    outcome = trainer_check.trainer()
    assert outcome.status is Status.PASS, outcome.found
    return {"headline": outcome.found}


def log_probs(context: Context) -> Figures:
    """The trainer's log-probs of packed trees in bfloat16, against transformers' in float32."""
    trainer, batch = _trainer(context), _work(context)
    found = by_token(batch.packs["packed"], trainer.log_probs(batch.packs["packed"], 1.0))
    model: Any = Qwen2ForCausalLM.from_pretrained(_small_model(context), dtype=torch.float32).to(_DEVICE)  # type: ignore[reportArgumentType]
    exact = [_log_probs_of(model, pack, _setting(context).trajectory_tokens) for pack in batch.packs["flat"]]
    off = difference(found, by_token(batch.packs["flat"], exact))
    mean, largest = float(off.mean()), float(off.max())
    assert mean <= MEAN_LIMITS["bfloat16"], mean
    assert largest <= MAX_LIMITS["bfloat16"], largest
    return {
        "headline": f"bfloat16 against float32: {mean:.1e} on average, {largest:.1e} at most",
        "mean": mean,
        "max": largest,
        "tokens": len(off),
    }


def _log_probs_of(model: Any, pack: Pack, trajectory_tokens: int) -> np.ndarray:
    """Of a flat pack, trajectory by trajectory; 0 for the first token of each."""
    computed = []
    for tokens in torch.from_numpy(pack.token).long().to(_DEVICE).split(trajectory_tokens):
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        computed += [tokens.new_zeros(1).float(), log_probs.gather(1, tokens[1:, None])[:, 0]]
    return torch.cat(computed).cpu().numpy()


def checkpoint(context: Context) -> Figures:
    """Save, take a step, load, take the same step: weights and optimizer come back."""
    trainer, folder = _trainer(context), _checkpoint(context)
    saved = _weights(trainer)
    start = time.perf_counter()
    trainer.save(folder, {})
    held = time.perf_counter() - start
    trainer.finish_save()
    written = time.perf_counter() - start
    first = _step(context, trainer)
    start = time.perf_counter()
    trainer.load(folder)
    loaded = time.perf_counter() - start
    for name, tensor in trainer.tensors():
        assert torch.equal(tensor.cpu(), saved[name]), f"{name} is not as it was saved"
    again = _step(context, trainer)
    gigabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
    return {
        "headline": (
            f"{gigabytes:.2f} GB: training waits {held:.2f} s, written after {written:.2f} s, loaded in "
            f"{loaded:.2f} s; the step repeats within {_same_step(first, again):.1e}"
        ),
        "gigabytes": gigabytes,
        "held_seconds": held,
        "written_seconds": written,
        "load_seconds": loaded,
    }


def offload(context: Context) -> Figures:
    """Offload everything and reload it: memory comes free, and the next step is the same."""
    trainer, folder = _trainer(context), _checkpoint(context)
    if not folder.exists():
        trainer.save(folder, {})
        trainer.finish_save()
    trainer.load(folder)
    first = _step(context, trainer)
    trainer.load(folder)
    held = _allocated()
    start = time.perf_counter()
    trainer.offload(weights=True)
    offloaded = time.perf_counter()
    left = _allocated()
    trainer.reload()
    reloaded = time.perf_counter()
    again = _step(context, trainer)
    assert not _CUDA or left < KEPT_SHARE * held, f"{left / 2**30:.2f} of {held / 2**30:.2f} GiB are left"
    return {
        "headline": (
            f"{held / 2**30:.2f} GiB to {left / 2**30:.2f} in {offloaded - start:.2f} s, back in "
            f"{reloaded - offloaded:.2f} s; the step repeats within {_same_step(first, again):.1e}"
        ),
        "held_gib": held / 2**30,
        "left_gib": left / 2**30,
        "offload_seconds": offloaded - start,
        "reload_seconds": reloaded - offloaded,
    }


def _allocated() -> int:
    _collect()
    return torch.cuda.memory_allocated() if _CUDA else 0


def _collect() -> None:
    gc.collect()
    if _CUDA:
        torch.cuda.empty_cache()


def train_step_0_5b(context: Context) -> Figures:
    """Packed against flat at the 0.5B shape, all layers."""
    return _train_step(context, "0.5b", {}, max_tokens_per_pack=32768, repeats=3)


def train_step_7b(context: Context) -> Figures:
    """Packed against flat at the 7B shape, with as many layers as fit into 80 GB."""
    return _train_step(context, "7b", {"num_hidden_layers": 4}, max_tokens_per_pack=16384, repeats=2)


def _train_step(
    context: Context, shape: str, changes: dict[str, int], max_tokens_per_pack: int, repeats: int
) -> Figures:
    if context.dry_run:
        shape, changes = "tiny", {}
        setting, repeats = Setting(1, 8, 32, 8, 2, 1024), 1
    else:
        setting = Setting(1, 256, 1536, 512, 2, max_tokens_per_pack)
    context.close()  # a process has one trainer at a time
    _collect()
    torch._dynamo.reset()
    sizes = SHAPES[shape] | changes
    dtype = "bfloat16" if _CUDA else "float32"
    scale = train_step.Scale({shape: sizes}, [setting], dtype, "none", repeats, profile=False)
    (line,) = train_step.measure(shape, sizes, scale)
    assert line["log_prob_difference_mean"] <= MEAN_LIMITS[dtype], line["log_prob_difference_mean"]
    packed = line["packed"]
    share, peak = packed["matrix_share"], packed["peak_gib"]
    rate = "" if share is None else f", {share:.0%} of the card's matrix rate"
    memory = "" if peak is None else f", {peak:.1f} GiB (flat {line['flat']['peak_gib']:.1f})"
    return {
        "headline": (
            f"{line['unique_tokens_per_second']:.0f} tokens/s{rate}, {line['flat_over_packed_time']:.2f} x "
            f"as fast as flat, {line['share_of_ideal']:.0%} of the ideal {line['ideal_ratio']:.2f}{memory}"
        ),
        **line,
    }


@contextmanager
def _new_trainer(context: Context) -> Iterator[MegatronTrainer]:
    torch._dynamo.reset()  # other stages had other shapes, and torch compiles a function for eight at most
    config = {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 0}, "offload": "all"}
    trainer = MegatronTrainer(
        _small_model(context),
        "bfloat16",
        TrainerConfig.model_validate(config),
        LearningConfig(),
        0,
        1,
        create_store(),
    )
    try:
        yield trainer
    finally:
        trainer.close()


def _trainer(context: Context) -> MegatronTrainer:
    """The small model's trainer in bfloat16."""
    return context.shared("trainer", lambda: _new_trainer(context))


def _small_model(context: Context) -> Path:
    folder = context.folder("small")
    if not (folder / "config.json").exists():
        write_model(folder, "bfloat16", SHAPES["tiny"] if context.dry_run else _SMALL)
    return folder


def _checkpoint(context: Context) -> Path:
    return context.folder("checkpoint") / "step"


def _setting(context: Context) -> Setting:
    return Setting(1, 8, 32, 8, 2, 1024) if context.dry_run else Setting(1, 256, 1024, 256, 2, 16384)


def _work(context: Context) -> Work:
    sizes = SHAPES["tiny"] if context.dry_run else _SMALL
    return work(_setting(context), sizes["vocab_size"])


def _weights(trainer: MegatronTrainer) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in trainer.tensors()}


def _step(context: Context, trainer: MegatronTrainer) -> np.ndarray:
    """Take an optimizer step, and return by how much it moved the log-probs."""
    batch = _work(context)
    packs = batch.packs["packed"]
    before = np.concatenate(trainer.log_probs(packs, 1.0))
    trainer.train_step(packs, 1.0, batch.denominator)
    return np.concatenate(trainer.log_probs(packs, 1.0)) - before


def _same_step(first: np.ndarray, again: np.ndarray) -> float:
    """The relative difference of two steps that should be the same. Sums on a GPU round in any order."""
    difference = float(np.linalg.norm(first - again) / np.linalg.norm(first))
    assert difference < SAME_STEP, f"the step after loading differs by {difference:.2g} of what it moves"
    return difference
