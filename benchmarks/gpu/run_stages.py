"""The stages of first_day.py that are whole training runs: the quickstart as it is, with a lost trainer, and
asynchronous; a model of the 0.5B shape; and a mixture.

Imported by grading processes too, so heavy modules are imported where they are used.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.stage_process import Context, Figures, SkippedError

if TYPE_CHECKING:
    from treepo.toy.recipe import Recipe

QUICKSTART, QUICKSTART_ASYNC = Path("examples/quickstart.yaml"), Path("examples/quickstart-async.yaml")
UNTAUGHT: dict[str, Any] = {
    "data.heldout": "null",
    "reward.function": f"{__name__}:coin",
    "checkpoint.every": "null",
}
"""Keys of a run whose model knows nothing."""
ACCURACY = 0.30, 0.50
"""Of the toy's model; its recipe aims at 0.4."""
_POLL_SECONDS = 0.1


def coin(prompt: str, response: str, answer: str, extra: Mapping[str, object]) -> float:
    """A reward for models that know nothing: without differences there would be nothing to train on."""
    del prompt, response, answer, extra
    return random.choice((-1.0, 1.0))


def toy(context: Context) -> Figures:
    """`treepo toy`."""
    from treepo.toy.make import make_toy
    from treepo.toy.recipe import RECIPE

    report = make_toy(_toy(context), recipe=_brief(RECIPE) if context.dry_run else RECIPE)
    low, high = ACCURACY
    assert context.dry_run or low <= report.sampled_accuracy <= high, report.sampled_accuracy
    return {
        "headline": f"made in {report.seconds:.1f} s, accuracy {report.sampled_accuracy:.3f}",
        "make_seconds": report.seconds,
        "accuracy": report.sampled_accuracy,
    }


def quickstart(context: Context) -> Figures:
    """`treepo train examples/quickstart.yaml`, with fewer steps."""
    steps = 1 if context.dry_run else min(12, round(3 * context.settings.stretch))
    overrides: dict[str, Any] = {"steps": steps}
    if context.dry_run:
        overrides |= {"data.prompts_per_step": 2, "evaluation.max_problems": 4}
    return _train(context, "quickstart", overrides)


def colocated_run(context: Context) -> Figures:
    """Three steps of a random model of the 0.5B shape, colocated, with the engine's own choice of memory.

    It oversamples, so trees that are growing pause while the trainer has the GPU.
    """
    from benchmarks.random_model import SHAPES, write_model
    from treepo.toy.byte_tokenizer import EOS_ID, byte_tokenizer

    folder = context.folder("colocated")
    shape = (
        SHAPES["tiny"] | {"vocab_size": 320, "max_position_embeddings": 4096}
        if context.dry_run
        else SHAPES["0.5b"]
    )
    write_model(folder, "bfloat16", shape, EOS_ID)
    byte_tokenizer(shape["max_position_embeddings"]).hugging_face.save_pretrained(folder)
    overrides = UNTAUGHT | {
        "steps": 1 if context.dry_run else 3,
        "model.path": folder,
        "sampling.oversample": 1.5,
        "engine.max_total_tokens": "null",
        "trainer.optimizer.learning_rate": 1e-6,
    }
    if context.dry_run:
        overrides |= {"data.prompts_per_step": 2, "engine.max_total_tokens": 60000}
    else:
        overrides |= {
            "data.prompts_per_step": 16,
            "sampling.segment_tokens": 256,
            "sampling.max_depth": 4,
            "sampling.max_response_tokens": 1024,
            "sampling.width": 16,
        }
    return _train(context, "colocated", overrides)


def mixture_run(context: Context) -> Figures:
    """Three steps of the toy mixture before its warm start, whose trainer replays the engine's experts."""
    from treepo.toy.make import make_toy
    from treepo.toy.recipe import MIXTURE

    model = make_toy(context.folder("mixture"), recipe=_brief(MIXTURE)).model
    overrides = UNTAUGHT | {
        "steps": 1 if context.dry_run else 3,
        "model.path": model,
        "trainer.routing_replay": "rollout",
    }
    if context.dry_run:
        overrides |= {"data.prompts_per_step": 2}
    figures = _train(context, "mixture", overrides)
    differs = figures["steps"][-1]["routing/own_choice_differs"]
    figures["headline"] = f"routers would differ in {differs:.2%} of their choices; {figures['headline']}"
    return figures


def lost_trainer(context: Context) -> Figures:
    """The quickstart with a trainer rank that is killed after the first checkpoint.

    It starts again in the same run, beside the engine on the same GPU, and goes on from there.
    """
    overrides: dict[str, Any] = {"steps": 6, "checkpoint.every": 1, "data.heldout": "null"}
    if context.dry_run:
        overrides |= {"steps": 3, "data.prompts_per_step": 2}
    figures = _train(context, "lost_trainer", overrides, meanwhile=_kill_a_rank)
    restarts, seconds = figures["summary"]["trainer_restarts"], figures["summary"]["phase_seconds"]
    assert restarts == 1, f"{restarts} restarts of the trainer"
    figures["headline"] = (
        f"the trainer was back after {seconds['restart trainer']:.1f} s; {figures['headline']}"
    )
    return figures


def async_run(context: Context) -> Figures:
    """The asynchronous quickstart, whose engine and trainer have GPUs of their own. Weights go by NCCL."""
    import torch

    if torch.cuda.device_count() == 1:
        raise SkippedError("needs two GPUs")
    overrides: dict[str, Any] = {"steps": 3, "data.heldout": "null", "weights.transport": "broadcast"}
    if context.dry_run:
        overrides |= {"data.prompts_per_step": 2}
    return _train(context, "async", overrides, QUICKSTART_ASYNC)


def _kill_a_rank(run: "subprocess.Popen[bytes]", out: Path) -> None:
    """Kill a trainer rank of the run as soon as there is a checkpoint."""
    import psutil

    from benchmarks.chaos.roles import of_role
    from treepo.training.checkpoints import saved

    while saved(out) is None:
        if run.poll() is not None:
            return
        time.sleep(_POLL_SECONDS)
    of_role("trainer", psutil.Process(run.pid).children(recursive=True))[0].kill()


def _train(
    context: Context,
    name: str,
    overrides: dict[str, Any],
    config: Path = QUICKSTART,
    meanwhile: Callable[["subprocess.Popen[bytes]", Path], None] = lambda *_: None,
) -> Figures:
    """Run the command `treepo train` on a configuration like the quickstart's, with these keys changed too.
    meanwhile: called with the run's process and folder once it has started.
    """
    if not (_toy(context) / "toy.json").exists():
        toy(context)
    out = context.folder("runs") / name
    toys = _toy(context)
    usual = {
        "out": out,
        "model.path": toys / "model",
        "data.train": toys / "train.jsonl",
        "data.heldout": toys / "heldout.jsonl",
        "engine.attention_backend": context.settings.attention_backend,
    }
    command = [sys.executable, "-c", "from treepo.cli.main import main; main()", "train", str(config)]
    changes = [f"{key}={value}" for key, value in (usual | overrides).items()]
    printed = context.folder("runs") / f"{name}.txt"
    with printed.open("wb") as output:
        run = subprocess.Popen([*command, *changes], stdin=subprocess.DEVNULL, stderr=output)
        meanwhile(run, out)
        code = run.wait()
    errors = printed.read_text(errors="replace")
    sys.stderr.write(errors)
    assert code == 0, (errors.strip().splitlines() or [f"exit code {code}"])[-1]
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds/step" in line]  # the others are evaluations
    assert len(steps) == summary["steps"] == overrides["steps"], (len(steps), summary["steps"])
    last = steps[-1]
    phases = ("sample", "log_probs", "train", "weight_sync")
    seconds = {phase: last[f"seconds/{phase}"] for phase in phases}
    shown = ", ".join(f"{phase.replace('_', ' ')} {took:.2f}" for phase, took in seconds.items())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    accuracy = "" if before is None else f", held-out accuracy {before:.2f} to {after:.2f}"
    return {
        "headline": (
            f"{len(steps)} steps in {summary['seconds']:.1f} s; seconds of the last: {shown}; "
            f"{last['rollout/tokens_per_second']:.0f} tokens/s, log-probs differ by "
            f"{last['logprob_difference_mean']:.1e}{accuracy}"
        ),
        "summary": summary,
        "steps": steps,
        "overrides": {key: str(value) for key, value in (usual | overrides).items()},
    }


def _brief(recipe: "Recipe") -> "Recipe":
    """A toy that is made at once, and knows nothing."""
    return replace(
        recipe, train_problems=24, heldout_problems=8, measured_samples=1, steps=2, careful_steps=1,
        warmup_steps=1, batch=2,
    )  # fmt: skip


def _toy(context: Context) -> Path:
    return context.folder("toy")
