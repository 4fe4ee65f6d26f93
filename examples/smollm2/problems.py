"""Makes the sums of examples/smollm2/train.yaml:

    python examples/smollm2/problems.py runs/smollm2

A problem asks for the sum of two numbers from 1 to 19, and opens the answer with the sum itself:

    user         What is 14 + 9?
    assistant    14 + 9 =

Every pair is there in both orders. A fifth of the pairs is held out; neither order of one is trained.
"""

import json
import random
import sys
from itertools import combinations_with_replacement
from pathlib import Path

LARGEST = 19
HELD_OUT = 0.2
SEED = 0


def main(folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl."""
    draws = random.Random(SEED)
    pairs = list(combinations_with_replacement(range(1, LARGEST + 1), 2))
    draws.shuffle(pairs)
    held_out = round(HELD_OUT * len(pairs))
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", pairs[held_out:]), ("heldout", pairs[:held_out])):
        problems = sorted({ordered for a, b in chosen for ordered in ((a, b), (b, a))})
        draws.shuffle(problems)
        lines = "".join(json.dumps(row(*problem)) + "\n" for problem in problems)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(problems)} problems")  # noqa: T201  # a script


def row(a: int, b: int) -> dict[str, object]:
    """A problem in the columns that train.yaml names."""
    opened = [
        {"role": "user", "content": f"What is {a} + {b}?"},
        {"role": "assistant", "content": f"{a} + {b} ="},
    ]
    return {"prompt": opened, "answer": str(a + b)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2/problems.py FOLDER")
    main(Path(sys.argv[1]))
