"""Accuracy for each decoded token: train small models with several ways of sampling and learning.

    OMP_NUM_THREADS=1 python -m benchmarks.learning                 # all that is missing, then the summary
    OMP_NUM_THREADS=1 python -m benchmarks.learning --only sums/treepo search/grpo --seeds 1 2
    python -m benchmarks.learning --summary                         # of the results as they are

Results are added to benchmarks/results/learning.jsonl run by run; runs that it has are passed over, so a
benchmark that was interrupted goes on. A run keeps about one core busy: on two, start it twice with different
seeds. Each line is one evaluation of one run: on held-out problems, sequentially, after `decoded_tokens` in
training. `arms` says what is equal between the arms, `summary` what it makes of the lines. The starts are
made once, in --starts.
"""

import argparse
from pathlib import Path

import orjson

from benchmarks.learning.arms import ARMS, TASKS
from benchmarks.learning.run import Point, run
from benchmarks.learning.summary import summary

RESULTS = Path("benchmarks/results/learning.jsonl")


def read(path: Path) -> list[Point]:
    """The evaluations in a file of results."""
    return [Point(**orjson.loads(line)) for line in path.read_bytes().splitlines()] if path.exists() else []


def main() -> None:
    names = [f"{task}/{arm}" for task in TASKS for arm in ARMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TASK/ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--reach", type=float, help="accuracy of tokens_to; default: the baseline's")
    parser.add_argument("--starts", type=Path, default=Path("runs/learning"), help="folder of the models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in [] if options.summary else options.seeds:
        for name in options.only:
            task, arm = name.split("/")
            if any((one.task, one.arm, one.seed) == (task, arm, seed) for one in read(options.out)):
                continue
            points = run(task, arm, seed, options.starts)
            with options.out.open("ab") as out:
                out.write(b"".join(orjson.dumps(point, option=orjson.OPT_APPEND_NEWLINE) for point in points))
            print(orjson.dumps(points[-1]).decode(), flush=True)  # noqa: T201 - the result
    for line in summary(read(options.out), options.reach):
        print(orjson.dumps(line).decode())  # noqa: T201 - the result


if __name__ == "__main__":
    main()
