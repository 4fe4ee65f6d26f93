"""Injects drawn faults into real short runs and checks what must hold afterwards. JSON lines.

    python -m benchmarks.chaos --cases 60 --seed 1
    python -m benchmarks.chaos --seed 1 --case 17          the same case again, alone
    python -m benchmarks.chaos --resume-exact 20           kill -9 of everything at random moments

A case takes one to three minutes on two cores. Folders of cases that failed are kept for study.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.chaos import resume_exact
from benchmarks.chaos.cases import Workshop
from benchmarks.chaos.faults import draw


def main() -> int:
    """Returns 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--cases", type=int, default=60, help="number of cases, from case 0")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--seed", type=int, default=0, help="the seed of all draws")
    parser.add_argument("--resume-exact", type=int, metavar="N", help="kill everything N times instead")
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"), help="folder for inputs and runs")
    arguments = parser.parse_args()
    workshop = Workshop(arguments.work.absolute())
    if arguments.resume_exact is not None:
        return resume_exact.run(workshop, arguments.resume_exact, arguments.seed)
    cases = range(arguments.cases) if arguments.case is None else [arguments.case]
    return _cases(workshop, arguments.seed, cases)


def _cases(workshop: Workshop, seed: int, cases: Sequence[int]) -> int:
    began, lines = time.monotonic(), []
    for case in cases:
        folder = workshop.folder / f"seed-{seed}-case-{case}"
        line = {"seed": seed, "case": case} | workshop.run(draw(seed, case), folder)
        _print(line)
        lines.append(line)
        if line["ok"]:
            shutil.rmtree(folder)
    struck = [line for line in lines if line["struck"]]
    _print(
        {
            "cases": len(lines),
            "struck": len(struck),
            "ok": sum(line["ok"] for line in lines),
            "lost": sum(line["lost"] for line in lines),
            "doubled": sum(line["doubled"] for line in lines),
            "hung": sum(line["hung"] for line in lines),
            "leftovers": sum(len(line["leftovers"]) for line in lines),
            "seconds": round(time.monotonic() - began),
        }
    )
    return int(any(not line["ok"] for line in lines))


def _print(line: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
