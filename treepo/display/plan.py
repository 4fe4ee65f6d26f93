"""`treepo plan` on a terminal: memory by part, the step by phase, and whether the run fits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from treepo.display.live import live_progress
from treepo.planning.hardware import GIB
from treepo.planning.memory.parts import Memory
from treepo.planning.plan import Plan

_PHASES = {"log_probs": "log-probs", "weight_sync": "weight sync"}


@contextmanager
def plan_progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows the work in progress on a live terminal."""
    progress = live_progress(console, SpinnerColumn(), TextColumn("{task.description}", markup=False))
    task = progress.add_task("", total=None)
    with progress:
        yield lambda work: progress.update(task, description=work)


def show_plan(console: Console, name: str, plan: Plan) -> None:
    """Prints everything; the last lines say whether the run fits, or which layouts would."""
    _show_run(console, name, plan)
    if plan.fit.device.name == "cpu":
        console.print("Memory is this machine's; rates are assumed, those of one core of a common server.")
    _show_memory(console, plan)
    if plan.step is not None:
        _show_step(console, plan)
    _show_verdict(console, plan)


def _show_run(console: Console, name: str, plan: Plan) -> None:
    config, fitted = plan.config, plan.fit
    parallel, engine = config.trainer.parallel, config.engine
    layout = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}", f"data {parallel.data}"]
    if parallel.virtual_pipeline > 1:
        layout.insert(2, f"virtual pipeline {parallel.virtual_pipeline}")
    if parallel.context > 1:
        layout.insert(1, f"context {parallel.context}")
    if parallel.expert > 1:
        layout.append(f"expert {parallel.expert}")
    devices = fitted.footprint.devices
    where = f"{_count(devices, 'process', 'es')} on this machine"
    if fitted.device.name != "cpu":
        nodes = _count(fitted.footprint.nodes, "node")
        where = f"{devices} x {fitted.device.name} on {nodes} of {config.plan.devices_per_node}"
    console.print(
        Text.assemble((name, "bold"), f": {plan.parameters:,} parameters, {where}"),
        soft_wrap=True,
    )
    console.print(
        f"trainer: {' x '.join(layout)}, recompute {config.trainer.recompute}, packs of "
        f"{config.trainer.max_tokens_per_pack:,} tokens",
        highlight=False,
        soft_wrap=True,
    )
    if config.loop.mode == "async":
        ahead = f"loop: asynchronous, at most {config.max_untrained:,} trees started and not trained"
        console.print(ahead, highlight=False, soft_wrap=True)
    elif config.sampling.oversample > 1:
        ahead = f"loop: synchronous, {config.max_untrained:,} trees started for each step"
        console.print(ahead, highlight=False, soft_wrap=True)
    sizes = [f"tensor {engine.tensor}"]
    if engine.pipeline > 1:
        sizes.append(f"pipeline {engine.pipeline}")
    if engine.expert > 1:
        sizes.append(f"expert {engine.expert}")
    console.print(
        f"engines: {engine.count} x {' x '.join(sizes)}, placement {config.placement}, weight transport "
        f"{config.weights.transport}",
        highlight=False,
        soft_wrap=True,
    )


def _show_memory(console: Console, plan: Plan) -> None:
    fitted, engine = plan.fit, plan.fit.engine
    _memory_table(console, "Trainer: each device at its peak", fitted.trainer)
    _memory_table(console, "Engine: each device", [engine.memory])
    console.print(
        f"The cache holds {engine.kv_tokens:,} tokens: {engine.expected_trees:,} trees of the expected "
        f"{engine.expected_tree:,} tokens at once, or {engine.longest_trees:,} of the longest possible "
        f"{engine.longest_tree:,}.",
        highlight=False,
        soft_wrap=True,
    )
    _memory_table(console, "Host: the fullest node", [fitted.host])
    console.print(
        f"On disk: a training checkpoint of {_size(plan.checkpoint)}, a Hugging Face folder of "
        f"{_size(plan.exported)}.",
        highlight=False,
    )


def _memory_table(console: Console, title: str, memories: Sequence[Memory]) -> None:
    """A column for each process; a single one has its notes beside it."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for memory in memories:
        table.add_column(_heading(memory), justify="right")
    alone = len(memories) == 1
    if alone:
        table.add_column("how", style="dim")
    names = dict.fromkeys(name for memory in memories for name in memory.parts)
    for name in names:
        values = [memory.parts.get(name, 0.0) for memory in memories]
        if any(values):
            note = [memories[0].notes.get(name, "")] if alone else []
            table.add_row(name, *map(_memory, values), *note)
    table.add_section()
    table.add_row("total", *(_memory(memory.total) for memory in memories))
    console.print(table)


def _heading(memory: Memory) -> str:
    """The owner without words of the table's title."""
    return memory.owner.removeprefix("trainer, ").removeprefix("pipeline ")


def _show_step(console: Console, plan: Plan) -> None:
    step, sampling = plan.step, plan.sampling
    assert step is not None
    assert sampling is not None
    table = Table(title="A step, seconds from stated rates", title_justify="left")
    table.add_column("")
    table.add_column("s", justify="right")
    table.add_column("how", style="dim")
    for name, phase in step.phases.items():
        table.add_row(_PHASES.get(name, name), f"{phase.seconds:,.1f}", phase.note)
    table.add_section()
    table.add_row(
        "total",
        f"{step.seconds:,.1f}",
        f"{step.tokens_per_second:,.0f} tokens of answers a second; "
        f"{sampling.leaf_tokens / sampling.decoded_tokens:.2f} for each decoded token",
    )
    console.print(table)
    together = "work side by side" if plan.config.loop.mode == "async" else "take turns"
    console.print(
        f"Engines and trainer {together}: {step.engines_idle:.0%} of the engines' time and "
        f"{step.trainer_idle:.0%} of the trainer's pass without computation, weight syncs included.",
        highlight=False,
        soft_wrap=True,
    )
    learning, data = plan.config.learning, plan.config.data
    if (tokens := data.decoded_tokens_per_step) is not None:
        trees = tokens / sampling.decoded_tokens * data.prompts_per_step
        console.print(
            f"Planned with data.prompts_per_step = {data.prompts_per_step:,} trees, which decode "
            f"{sampling.decoded_tokens:,.0f} tokens; data.decoded_tokens_per_step = {tokens:,} is "
            f"{trees:,.0f} of these trees.",
            highlight=False,
            soft_wrap=True,
        )
    if learning.dynamic_sampling:
        console.print(
            f"Not included: refills of learning.dynamic_sampling, at most {learning.max_refills} a step.",
            highlight=False,
        )


def _show_verdict(console: Console, plan: Plan) -> None:
    if plan.fit.problem is None:
        nearest = f" Nearest to its limit: {plan.fit.fullest}"
        console.print(Text.assemble(("It fits.", "bold green"), nearest), soft_wrap=True)
        return
    console.print(Text.assemble(("It does not fit:", "bold red"), f" {plan.fit.problem}"), soft_wrap=True)
    if not plan.proposals:
        console.print("No similar layout on up to four times the devices fits either.")
        return
    console.print("The nearest that fit:")
    for proposal in plan.proposals:
        console.print(f"  {' '.join(proposal.overrides)}", highlight=False, soft_wrap=True)
        console.print(f"      {proposal.fullest}", style="dim", highlight=False, soft_wrap=True)


def _memory(value: float) -> str:
    if not value:
        return ""
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / (1 << 20):.1f} MiB"


def _size(value: float) -> str:
    return f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"
