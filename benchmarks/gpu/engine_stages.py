"""The stages of first_day.py with one SGLang engine, and a trainer of the same weights beside it."""

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.driver import text_of
from benchmarks.gpu import rollout
from benchmarks.gpu.stage_process import Context, Figures, SkippedError
from benchmarks.packed_and_flat import Setting, work
from benchmarks.random_model import SHAPES, write_model
from megatron_bridge.trainer import MegatronTrainer, create_store
from sglang_rollout.engine import SGLangEngine
from treepo.config.engine import EngineConfig
from treepo.config.learning import LearningConfig
from treepo.config.log_prob_check import MEAN_LIMITS
from treepo.config.run import RunConfig
from treepo.config.sampling import SamplingConfig
from treepo.config.trainer import OptimizerConfig, TrainerConfig
from treepo.doctor.engine_check import LocalSink
from treepo.learning.packing import Pack
from treepo.planning.simulation.lengths import random_prompts
from treepo.protocols import GenerateOutput, GenerateRequest
from treepo.rollout.stopping import StopRule
from treepo.training.log_prob_check import check_log_probs
from treepo.weight_sync.broadcast import BroadcastSender
from treepo.weight_sync.colocated import ColocatedSender, Way
from treepo.weight_sync.disk import DiskSender
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import WeightStream
from treepo.weight_sync.wire import Sender

SECONDS = 60.0
BUCKET_BYTES = 256 << 20
PROMPT_TOKENS, ALONE_TOKENS = 128, 256
LEARNING_RATE = 5e-4
FREED_SHARE = 0.8
"""What `offload` must free of the memory of weights and cache: the rest is SGLang's own and CUDA graphs'."""
MOVED = 3.0
"""How many times the difference between engine and trainer an update must move the log-probs, to be seen."""

_CUDA = torch.cuda.is_available()
_DTYPE = "bfloat16" if _CUDA else "float32"


class LiveEngine:
    """An engine on an event loop that runs in a thread of its own."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def generate(self, prompt: np.ndarray, tokens: int) -> GenerateOutput:
        return self.call(self.engine.generate(GenerateRequest(prompt, len(prompt), tokens, 1.0, seed=0)))

    def log_probs(self, prompt: np.ndarray) -> np.ndarray:
        """Computed anew, without what is cached."""
        self.call(self.engine.clear_cache())
        return self.call(self.engine.log_probs(prompt))

    def close(self) -> None:
        async def close() -> None:
            self.engine.close()

        self.call(close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


class _LocalTrainer:
    """Implements `treepo.training.log_prob_check.LogProbs` with a trainer of this process."""

    def __init__(self, trainer: MegatronTrainer) -> None:
        self._trainer = trainer

    @property
    def dtype(self) -> str:
        return _DTYPE

    async def log_probs(self, packs: Sequence[Sequence[Pack]], temperature: float) -> list[list[np.ndarray]]:
        return [self._trainer.log_probs(of_replica, temperature) for of_replica in packs]


def engine_start(context: Context) -> Figures:
    """Start an engine that can give its memory away, with CUDA graphs; sample alone."""
    start = time.perf_counter()
    live = _engine(context)
    started = time.perf_counter() - start
    arguments = live.engine._sglang.manager.server_args  # what SGLang made of ours
    assert arguments.disable_cuda_graph is not _CUDA, "CUDA graphs are off"
    tokens = 8 if context.dry_run else ALONE_TOKENS
    live.generate(_prompt(context), tokens)
    start = time.perf_counter()
    live.generate(_prompt(context), tokens)
    alone = tokens / (time.perf_counter() - start)
    return {
        "headline": (
            f"{started:.1f} s, {live.engine.capacity()} KV tokens, one request alone {alone:.0f} tokens/s"
        ),
        "start_seconds": started,
        "kv_tokens": live.engine.capacity(),
        "tokens_per_second_alone": alone,
        "attention_backend": arguments.attention_backend,
        "sampling_backend": arguments.sampling_backend,
        "model": SHAPES[_shape(context)],
    }


def engine_log_probs(context: Context) -> Figures:
    """Sampled trees' log-probs, engine against trainer, by the check that precedes every training run."""
    figures = _compare(context)
    return {
        "headline": (
            f"engine against trainer on {figures['tokens']} sampled tokens: {figures['mean']:.1e} on "
            f"average, {figures['max']:.1e} at most"
        ),
        **figures,
    }


def engine_memory(context: Context) -> Figures:
    """Offload and reload; the engine serves the same weights."""
    live = _engine(context)
    if not _CUDA:
        raise SkippedError("needs a GPU")
    before = live.log_probs(_prompt(context))
    _trainer(context).release_cache()
    free = [_free_bytes()]
    start = time.perf_counter()
    live.call(live.engine.offload())
    offloaded = time.perf_counter()
    free.append(_free_bytes())
    live.call(live.engine.reload("weights"))
    live.call(live.engine.reload("cache"))
    reloaded = time.perf_counter()
    free.append(_free_bytes())
    freed, left = free[1] - free[0], free[0] - free[2]
    sizes = SHAPES[_shape(context)]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    token_bytes = 2 * 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * head
    expected = token_bytes * live.engine.capacity() + sum(
        info.nbytes for info in _trainer(context).manifest()
    )
    difference = float(np.abs(live.log_probs(_prompt(context)) - before).mean())
    assert difference <= MEAN_LIMITS[_DTYPE], f"log-probs changed by {difference:.2g} on average"
    assert freed >= FREED_SHARE * expected, f"{freed / 2**30:.2f} GiB freed of {expected / 2**30:.2f}"
    return {
        "headline": (
            f"{freed / 2**30:.1f} GiB freed in {offloaded - start:.2f} s, reloaded in "
            f"{reloaded - offloaded:.2f} s, log-probs differ by {difference:.1e}"
        ),
        "freed_gib": freed / 2**30,
        "weights_and_cache_gib": expected / 2**30,
        "lost_gib": left / 2**30,
        "offload_seconds": offloaded - start,
        "reload_seconds": reloaded - offloaded,
        "log_prob_difference": difference,
    }


def interruption(context: Context) -> Figures:
    """Hold the engine while it samples, as oversampling and asynchronous runs do, until some requests have
    come back unfinished; on a GPU it gives its memory away meanwhile. The rest is requested again.
    """
    live = _engine(context)
    prompts = random_prompts(8, PROMPT_TOKENS, SHAPES[_shape(context)]["vocab_size"])
    tokens = 128 if context.dry_run else 512
    start = time.perf_counter()
    answers = live.call(_sample_with_holds(live.engine, [prompt.tokens for prompt in prompts], tokens))
    seconds = time.perf_counter() - start
    unfinished = _interruptions(answers)
    assert unfinished, "no request was interrupted"
    off: list[np.ndarray] = []
    for prompt, parts in zip(prompts, answers, strict=True):
        path = np.concatenate([prompt.tokens, *(part.tokens for part in parts)])
        computed = live.log_probs(path)[len(prompt.tokens) - 1 :]
        off.append(np.abs(computed - np.concatenate([part.log_probs for part in parts])))
    mean = float(np.concatenate(off).mean())
    assert mean <= MEAN_LIMITS[_DTYPE], f"log-probs of interrupted requests are off by {mean:.2g} on average"
    return {
        "headline": (
            f"{unfinished} interruptions of {len(prompts)} requests in {seconds:.1f} s; the log-probs of "
            f"their {sum(map(len, off))} tokens are the engine's within {mean:.1e}"
        ),
        "interruptions": unfinished,
        "seconds": seconds,
        "log_prob_difference": mean,
    }


def _interruptions(answers: Sequence[Sequence[GenerateOutput]]) -> int:
    """How many requests came back with a part of their tokens."""
    return sum(part.finish == "interrupted" and len(part.tokens) > 0 for parts in answers for part in parts)


async def _sample_with_holds(
    engine: SGLangEngine, prompts: Sequence[np.ndarray], tokens: int
) -> list[list[GenerateOutput]]:
    """The outputs of each prompt's requests, which follow one another until it has `tokens` tokens."""
    answers: list[list[GenerateOutput]] = [[] for _ in prompts]

    async def sample(prompt: np.ndarray, parts: list[GenerateOutput]) -> None:
        context, left = prompt, tokens
        while left:
            request = GenerateRequest(context, len(prompt), left, 1.0, seed=0)
            parts.append(await engine.generate(request))
            if parts[-1].finish == "eos":
                return
            context = np.concatenate([context, parts[-1].tokens])
            left -= len(parts[-1].tokens)

    running = asyncio.gather(*map(sample, prompts, answers))
    pauses = (0.01 * 2**doublings for doublings in range(10))
    for pause in pauses:  # a fast machine is done within 0.2 s, a busy one has not decoded a token by then
        await asyncio.wait((running,), timeout=pause)
        if running.done() or _interruptions(answers):
            break
        await engine.hold()
        if _CUDA:
            await engine.offload()
            await engine.reload("weights")
            await engine.reload("cache")
        engine.release()
    await running
    return answers


def update_ipc(context: Context) -> Figures:
    """A weight sync through the GPU's memory."""
    return _update_colocated(context, "ipc")


def update_registered(context: Context) -> Figures:
    """A weight sync through host memory that CUDA registers."""
    return _update_colocated(context, "registered")


def update_pageable(context: Context) -> Figures:
    """A weight sync through host memory that CUDA does not know."""
    return _update_colocated(context, "pageable")


def update_disk(context: Context) -> Figures:
    """A weight sync through files."""
    return _update(context, DiskSender(context.folder("weights"), keep=1))


def update_host_broadcast(context: Context) -> Figures:
    """A weight sync by gloo."""
    return _update(context, BroadcastSender(torch.device("cpu"), "127.0.0.1", SECONDS))


def sampling(context: Context) -> Figures:
    """Trees against lock-step and sequential sampling, by benchmarks/gpu/rollout.py."""
    live = _engine(context)
    context.close("trainer")
    stretch = context.settings.stretch
    budget = rollout.Budget(3, time.perf_counter() + 40 * stretch)
    scale = _scale(context)
    line = live.call(rollout.compare(live.engine, _shape(context), scale, scale.widths[0], budget))
    return {
        "headline": (
            f"trees {line['tree']['trajectories_per_second']:.1f} trajectories/s, "
            f"{line['tree_over_lockstep']:.2f} x lock-step, {line['tree_over_sequential']:.2f} x sequential "
            f"(at most {line['total_over_unique']:.2f}), {line['repeats']} repeats"
        ),
        **line,
    }


def _update_colocated(context: Context, way: Way) -> Figures:
    if not _CUDA and way != "pageable":
        raise SkippedError("needs a GPU")
    device = torch.device("cuda", 0) if _CUDA else torch.device("cpu")
    figures = _update(context, ColocatedSender(device, way))
    taken = figures["way"]
    assert taken == way, f"it went the way {taken}: {'; '.join(figures['remarks'])}"
    return figures


def _update(context: Context, sender: Sender) -> Figures:
    """Train a step, send the weights twice (the first time connects), and look at what is served."""
    live, trainer, prompt = _engine(context), _trainer(context), _prompt(context)
    old = live.log_probs(prompt)
    live.generate(prompt, 1)
    assert live.generate(prompt, 1).cached_tokens > 0, "the prefix cache found nothing"
    batch = work(_setting(context), SHAPES[_shape(context)]["vocab_size"])
    trainer.train_step(batch.packs["packed"], 1.0, batch.denominator)
    manifest = trainer.manifest()
    stream = WeightStream(sender, BUCKET_BYTES, SECONDS)
    sink = LocalSink(live.engine, live.loop)
    seconds: list[float] = []
    remarks: list[str] = []
    try:
        for _ in range(2):
            version = live.engine.version + 1
            start = time.perf_counter()
            live.call(live.engine.begin(version, manifest))
            outcome = stream.send(LocalSource(trainer.tensors(), manifest), version, [sink])
            assert not outcome.failed, outcome.failed
            assert outcome.broken is None, outcome.broken
            remarks += [remark.text for remark in outcome.remarks]
            live.call(live.engine.commit())
            seconds.append(time.perf_counter() - start)
        way = sender.way if isinstance(sender, ColocatedSender) else None
    finally:
        stream.close()
    sampled = live.generate(prompt, 1)
    assert sampled.version == live.engine.version, sampled.version
    assert sampled.cached_tokens == 0, "a prefix of an older version was found"
    assert live.generate(prompt, 1).cached_tokens > 0, "the prefix cache found nothing after the update"
    moved = float(np.abs(live.log_probs(prompt) - old).mean())
    figures = _compare(context)
    assert moved > MOVED * figures["mean"], f"log-probs moved by {moved:.2g} only"
    size = sum(info.nbytes for info in manifest)
    return {
        "headline": (
            f"{size / 1e9:.2f} GB in {seconds[1]:.2f} s ({seconds[0]:.2f} s the first time), log-probs moved "
            f"by {moved:.1e} and are the trainer's within {figures['mean']:.1e}"
        ),
        "bytes": size,
        "seconds": seconds,
        "gigabytes_per_second": size / seconds[1] / 1e9,
        "moved_mean": moved,
        "way": way,
        "remarks": remarks,
        **figures,
    }


def _compare(context: Context) -> dict[str, float]:
    """Raises LogProbCheckError beyond the limits of a training run."""
    live, trainer = _engine(context), _trainer(context)
    config = RunConfig.model_validate(
        {
            "out": context.folder("run"),
            "steps": 1,
            "model": {"path": context.folder("engine"), "dtype": _DTYPE},
            "data": {"train": "none.jsonl", "prompts_per_step": 1},
            "sampling": _sampling(context),
        }
    )
    prompts = random_prompts(4, PROMPT_TOKENS, SHAPES[_shape(context)]["vocab_size"])
    return live.call(check_log_probs(config, prompts, text_of, [live.engine], _LocalTrainer(trainer)))


def _engine(context: Context) -> LiveEngine:
    return context.shared("engine", lambda: _new_engine(context))


def _trainer(context: Context) -> MegatronTrainer:
    return context.shared("trainer", lambda: _new_trainer(context))


@contextmanager
def _new_engine(context: Context) -> Iterator[LiveEngine]:
    engine = SGLangEngine(
        _model(context),
        _DTYPE,
        _scale(context).engine,
        seed=0,
        stop_rule=StopRule(_sampling(context), text_of),
        shares_device=_CUDA,
    )
    live = LiveEngine(engine)
    try:
        yield live
    finally:
        live.close()


@contextmanager
def _new_trainer(context: Context) -> Iterator[MegatronTrainer]:
    config = TrainerConfig(optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0))
    trainer = MegatronTrainer(_model(context), _DTYPE, config, LearningConfig(), 0, 1, create_store())
    try:
        yield trainer
    finally:
        trainer.close()


def _model(context: Context) -> Path:
    folder = context.folder("engine")
    if not (folder / "config.json").exists():
        write_model(folder, _DTYPE, SHAPES[_shape(context)])
    return folder


def _shape(context: Context) -> str:
    return "tiny" if context.dry_run else "0.5b"


def _scale(context: Context) -> rollout.Scale:
    """Sizes of the sampling, and the engine. Its cache leaves room for the trainer."""
    if context.dry_run:
        return replace(rollout.dry_scale(), prompts=2, max_depth=3)
    return rollout.Scale(
        shapes=["0.5b"],
        widths=[16],
        prompts=round(32 * context.settings.stretch),
        prompt_tokens=256,
        segment_tokens=64,
        max_depth=14,
        dtype=_DTYPE,
        engine=EngineConfig(
            attention_backend=context.settings.attention_backend,
            max_total_tokens=1 << 19,
            update_seconds=SECONDS,
            request_seconds=SECONDS,
        ),
    )


def _sampling(context: Context) -> SamplingConfig:
    scale = _scale(context)
    return scale.sampling(scale.widths[0])


def _setting(context: Context) -> Setting:
    return Setting(1, 8, 32, 8, 2, 1024) if context.dry_run else Setting(1, 256, 1024, 256, 2, 16384)


def _prompt(context: Context) -> np.ndarray:
    return random_prompts(5, PROMPT_TOKENS, SHAPES[_shape(context)]["vocab_size"])[-1].tokens


def _free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]
