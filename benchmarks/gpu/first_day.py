"""Proves the GPU paths on one card: every stage in a few minutes, one PASS, FAIL or SKIP line each.

    python -m benchmarks.gpu.first_day --out DIR [--minutes 12] [--only NAME ...] [--dry-run]

Run it in the repository's root. It needs one GPU (async_run two) and no network, and writes its own random
models. The stages run in the order of STAGES: without SGLang first, the cheap and telling ones before the
long ones. A stage that fails or hangs costs its own time; the next ones run. A stage that does not fit into
what is left of `--minutes` is a SKIP. More minutes than 12 lengthen the deadlines, the sampling and the
training runs.

DIR/first_day.jsonl has a line for the machine and one for each stage, with all its figures; DIR/GROUP.log has
what the stages of a group printed. `--only` takes names of stages and of groups. `--dry-run` runs the same
code on a CPU at tiny sizes. Exit code 1 if a stage failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from benchmarks.gpu.stage_process import Result, Settings, Stage, run_group
from treepo.doctor.software import installed_version

USUAL_MINUTES, DRY_MINUTES = 12.0, 40.0
_TRAINER, _ENGINE, _RUN = (f"benchmarks.gpu.{name}_stages" for name in ("trainer", "engine", "run"))
_TRANSPORT, _FLEX = "benchmarks.gpu.transport_stages", "benchmarks.gpu.flex_stage"


def _stage(name: str, module: str, seconds: float, group: str, deadline: float = 60.0) -> Stage:
    return Stage(name, f"{module}:{name}", seconds, deadline, group)


STAGES = (
    _stage("card", _TRANSPORT, 25, "trainer"),
    _stage("groups", _TRAINER, 7, "trainer"),
    _stage("broadcast_group", _TRAINER, 3, "trainer"),
    _stage("trainer_bf16", _TRAINER, 19, "trainer"),
    _stage("flex", _FLEX, 20, "trainer"),
    _stage("log_probs", _TRAINER, 20, "trainer"),
    _stage("checkpoint", _TRAINER, 19, "trainer"),
    _stage("offload", _TRAINER, 8, "trainer"),
    _stage("transport", _TRANSPORT, 25, "trainer"),
    _stage("engine_start", _ENGINE, 52, "engine", deadline=90.0),
    _stage("engine_log_probs", _ENGINE, 11, "engine"),
    _stage("engine_memory", _ENGINE, 2, "engine"),
    _stage("interruption", _ENGINE, 5, "engine"),
    _stage("update_ipc", _ENGINE, 6, "engine"),
    _stage("update_registered", _ENGINE, 6, "engine"),
    _stage("update_pageable", _ENGINE, 6, "engine"),
    _stage("update_disk", _ENGINE, 8, "engine"),
    _stage("update_host_broadcast", _ENGINE, 8, "engine"),
    _stage("sampling", _ENGINE, 45, "engine"),
    _stage("toy", _RUN, 20, "run"),
    _stage("quickstart", _RUN, 55, "run", deadline=90.0),
    _stage("colocated_run", _RUN, 75, "run", deadline=120.0),
    _stage("mixture_run", _RUN, 50, "run", deadline=90.0),
    _stage("lost_trainer", _RUN, 80, "run", deadline=150.0),
    _stage("async_run", _RUN, 60, "run", deadline=120.0),
    _stage("train_step_0_5b", _TRAINER, 37, "trainer"),
    _stage("train_step_7b", _TRAINER, 45, "trainer"),
)
"""Seconds were measured on an H200 or estimated from what was; a group's first stage includes the start of
its process. Only starting an engine and the whole training runs may take more than a minute. The train steps
come last: they measure, and prove nothing that the stages before them have not.
"""


def chosen(names: Sequence[str] | None) -> list[Stage]:
    """The stages with these names or of these groups, in their order; all if no name is given."""
    return [stage for stage in STAGES if not names or stage.name in names or stage.group in names]


def run(stages: Sequence[Stage], settings: Settings, record: Path) -> list[Result]:
    """Run the stages; print and record the results as they come."""
    results = []
    for _, group in groupby(stages, key=lambda stage: stage.group):
        for result in run_group(list(group), settings):
            results.append(result)
            _append(record, _as_json(result))
            _say(_line(result))
    return results


def _as_json(result: Result) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if value or key == "seconds"}


def _line(result: Result) -> str:
    line = f"{result.status} {result.stage:<22}{result.seconds:6.1f} s  {result.headline}"
    return "\n".join([line, *(f"       | {text}" for text in result.log)])


def _table(results: Iterable[Result]) -> str:
    return "\n".join(f"{one.status} {one.stage:<22} {one.headline}" for one in results)


def _append(record: Path, line: dict[str, Any]) -> None:
    with record.open("ab") as file:
        file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def card_name() -> str | None:
    """Name, memory and driver of the first GPU, by nvidia-smi; None if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def machine(card: str) -> dict[str, Any]:
    """What the figures depend on: the card, the software, the date and the command."""
    packages = ("torch", "triton", "sglang", "megatron-core", "transformers", "ray", "transformer-engine")
    return {
        "card": card,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": " ".join(["python -m benchmarks.gpu.first_day", *sys.argv[1:]]),
        "packages": {name: installed_version(name) for name in packages},
    }


def main() -> int:
    names = {name for stage in STAGES for name in (stage.name, stage.group)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and logs")
    parser.add_argument("--minutes", type=float, help="time for all stages together, 12 by default")
    parser.add_argument("--only", nargs="+", choices=sorted(names), metavar="NAME")
    parser.add_argument(
        "--attention-backend", default="triton", help="SGLang's; triton needs no package beside it"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    arguments = parser.parse_args()
    card = "cpu" if arguments.dry_run else card_name()
    if card is None:
        parser.error("nvidia-smi shows no GPU; --dry-run runs on a CPU")
    minutes = arguments.minutes or (DRY_MINUTES if arguments.dry_run else USUAL_MINUTES)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "first_day.jsonl"
    start = time.time()
    # An error ends what a stage has started; without this, SIGTERM would leave it running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="first-day-", ignore_cleanup_errors=True) as scratch:
        settings = Settings(
            dry_run=arguments.dry_run,
            out=out,
            scratch=Path(scratch),
            end=start + 60 * minutes,
            stretch=1.0 if arguments.dry_run else max(1.0, minutes / USUAL_MINUTES),
            attention_backend=arguments.attention_backend,
        )
        _append(record, machine(card))
        results = run(chosen(arguments.only), settings, record)
    failed = sum(result.status == "FAIL" for result in results)
    _say(f"\n{_table(results)}\n{len(results)} stages, {failed} failed, {time.time() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
