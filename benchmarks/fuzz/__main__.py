"""Fuzzes every reader of files, messages and variables, and prints one JSON line for each.

    python -m benchmarks.fuzz                                    100,000 inputs for every reader
    python -m benchmarks.fuzz --reader tree --inputs 5000        one reader
    python -m benchmarks.fuzz --reader tree --input FILE         one saved input, with its traceback

Lines: inputs, inputs a second, accepted (inputs without an error), branches (lines and branches of our
packages that were reached), outcomes (distinct errors), failures (kind, and the file with the input).
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.fuzz.apart import fuzz_apart
from benchmarks.fuzz.loop import as_line
from benchmarks.fuzz.readers import READERS, open_reader


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", choices=sorted(READERS), action="append")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--input", type=Path, help="run this input alone")
    arguments = parser.parse_args()
    names = arguments.reader or list(READERS)
    if arguments.input is not None:
        with open_reader(names[0]) as reader:
            print(repr(reader.read(arguments.input.read_bytes()))[:2000])  # noqa: T201 - the benchmark's output
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in names:
        result = fuzz_apart(name, arguments.inputs, arguments.seed, arguments.out)
        print(json.dumps(as_line(name, result)), flush=True)  # noqa: T201 - the benchmark's output
        failed |= bool(result.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
