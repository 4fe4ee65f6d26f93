"""What waiting costs engines and trainer, and what oversampling and `loop.mode: async` save of it.

    python -m benchmarks.asynchrony --real         # in the repository's root, after `treepo toy`
    python -m benchmarks.asynchrony --simulated

`--real`: the quickstart's model with long answers, on two CPU cores (asynchrony_real.py); 20 minutes.
`--simulated`: the paper's 7B setting on 64 and 512 GPUs in virtual time (asynchrony_simulated.py). One JSON
line a setting.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import orjson

from benchmarks import asynchrony_real, asynchrony_simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--real", action="store_true")
    kind.add_argument("--simulated", action="store_true")
    asynchrony_real.add_arguments(parser)
    asynchrony_simulated.add_arguments(parser)
    arguments = parser.parse_args()
    for line in lines(arguments):
        sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.flush()


def lines(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    module = asynchrony_simulated if arguments.simulated else asynchrony_real
    for line in module.lines(arguments):
        yield {"benchmark": "asynchrony", "simulated": arguments.simulated, **line}


if __name__ == "__main__":
    main()
