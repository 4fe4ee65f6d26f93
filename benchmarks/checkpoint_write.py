"""Writing the files of a checkpoint with checksums and reading them back, against torch's own writer.

    python -m benchmarks.checkpoint_write --mb 128 --folder .

Both write the same tensors to the folder's disk in turns. Prints one JSON line: the median seconds of both,
and their ratio. No ranks and no GPU are needed.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_bridge.checked_writer import CheckedWriter

TENSORS = 16


def seconds_of(writer: Any, state: dict[str, Tensor], where: Path) -> float:
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        start = time.perf_counter()
        save(state, storage_writer=writer(folder), no_dist=True)
        return time.perf_counter() - start
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    state = {f"{number}": torch.randn((options.mb << 18) // TENSORS) for number in range(TENSORS)}
    rounds = [
        [seconds_of(writer, state, options.folder) for writer in (FileSystemWriter, CheckedWriter)]
        for _ in range(options.rounds)
    ]
    plain, checked = (statistics.median(of_one) for of_one in zip(*rounds, strict=True))
    line = {"mb": options.mb, "seconds": plain, "seconds_checked": checked, "ratio": checked / plain}
    print(json.dumps({key: round(value, 3) for key, value in line.items()}))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
