"""Measures the ways of `weights.transport: colocated` between two processes on one GPU. Prints JSON lines.

    python -m benchmarks.gpu.colocated

The sender has random weights in bfloat16 on the GPU, as trainer rank 0 has; the other process receives every
bucket as an engine's rank does, on the same GPU, and verifies its checksum. Ways: `pageable` and `registered`
host memory, and `ipc`, the GPU's own memory. An update is timed from the first tensor to the last answer,
checksums on both sides included; loading into a model is not part of it. `first_seconds` is the first
update's, which also connects, and registers host memory.

Needs one GPU, and neither SGLang nor Megatron-Core. `--dry-run` runs the same code on a CPU at a tiny size,
where every way is `pageable`.
"""

import argparse
import statistics
import sys
import time
from typing import Any, get_args

import orjson
import torch

from benchmarks.sink_process import ProcessSink
from treepo.weight_sync.colocated import ColocatedSender, Way
from treepo.weight_sync.lanes import LocalSource
from treepo.weight_sync.send import WeightStream
from treepo.weight_sync.wire import TensorInfo

SECONDS = 120.0  # for a step
COLUMNS = 4096


def measure(device: torch.device, way: Way, megabytes: int, bucket_mb: int, repeats: int) -> dict[str, Any]:
    """Send `megabytes` MiB of weights by one way, `repeats` times after a first time.

    Returns a record: `way` is the one that was taken, `asked` the one that was asked for; `error` is empty if
    every bucket arrived with the checksum that it was sent with; `remarks` are lines for a run's log.
    """
    rows = 8 * 1024 * 1024 // (2 * COLUMNS)  # 8 MiB a tensor
    generator = torch.Generator(device).manual_seed(0)
    tensors = {
        f"tensor.{index}": torch.randn(
            rows, COLUMNS, dtype=torch.bfloat16, device=device, generator=generator
        )
        for index in range(max(megabytes // 8, 1))
    }
    manifest = tuple(TensorInfo.of(name, tensor) for name, tensor in tensors.items())
    nbytes = sum(info.nbytes for info in manifest)
    sender = ColocatedSender(device, way)
    stream = WeightStream(sender, bucket_mb << 20, SECONDS)
    sink = ProcessSink("sink", device)
    seconds: list[float] = []
    remarks: list[str] = []
    error, taken = "", None
    try:
        for version in range(1, repeats + 2):
            start = time.perf_counter()
            outcome = stream.send(LocalSource(tensors.items(), manifest), version, [sink])
            seconds.append(time.perf_counter() - start)
            remarks += [remark.text for remark in outcome.remarks]
            taken = sender.way
            error = str(outcome.failed.get(sink.name, outcome.broken or ""))
            if error:
                break
            sink.order("end").result()
    finally:
        stream.close()
        sink.close()
    record = {
        "benchmark": "colocated",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "asked": way,
        "way": taken,
        "error": error,
        "remarks": remarks,
        "bytes": nbytes,
        "bucket_mb": bucket_mb,
        "repeats": repeats,
        "first_seconds": seconds[0],
    }
    if not error:
        median = statistics.median(seconds[1:])
        record |= {"seconds": median, "gb_per_second": nbytes / median / 1e9}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(get_args(Way)), choices=get_args(Way))
    parser.add_argument("--megabytes", type=int, default=4096, help="MiB of weights")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at a tiny size")
    arguments = parser.parse_args()
    device = torch.device("cpu") if arguments.dry_run else torch.device("cuda", 0)
    megabytes = 32 if arguments.dry_run else arguments.megabytes
    records = [
        measure(device, way, megabytes, min(arguments.bucket_mb, megabytes // 2), arguments.repeats)
        for way in arguments.ways
    ]
    for record in records:
        sys.stdout.buffer.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.flush()
    wrong = [
        each for each in records if each["error"] or (not arguments.dry_run and each["way"] != each["asked"])
    ]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
