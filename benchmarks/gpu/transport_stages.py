"""The stages of first_day.py about the card's rates, and about memory that trainer and engine share."""

from typing import get_args

import torch

from benchmarks.gpu.colocated import measure
from benchmarks.gpu.stage_process import Context, Figures
from benchmarks.gpu.timing import median_seconds
from benchmarks.gpu.train_step import MATRIX_RATE
from treepo.weight_sync.colocated import Way

REPEATS = 10

_CUDA = torch.cuda.is_available()
_DEVICE = torch.device("cuda", 0) if _CUDA else torch.device("cpu")


def card(context: Context) -> Figures:
    """Rates of a matrix product in bfloat16, and of copies within the card and to the host."""
    size = 256 if context.dry_run else 8192
    a, b = (torch.randn(size, size, device=_DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / median_seconds(lambda: a @ b, REPEATS) / 1e12
    number = (1 if context.dry_run else 256) << 20
    here, there = (torch.empty(number, dtype=torch.uint8, device=_DEVICE) for _ in range(2))
    rates = {"within": 2 * number / median_seconds(lambda: there.copy_(here), REPEATS) / 1e9}
    hosts = {"pageable": torch.ones(number, dtype=torch.uint8)}
    if _CUDA:
        hosts["pinned"] = hosts["pageable"].pin_memory()
    for name, host in hosts.items():
        rates[f"{name}_to_device"] = number / median_seconds(lambda: here.copy_(host), REPEATS) / 1e9  # noqa: B023
        rates[f"{name}_to_host"] = number / median_seconds(lambda: host.copy_(here), REPEATS) / 1e9  # noqa: B023
    name = torch.cuda.get_device_name() if _CUDA else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if _CUDA else None
    copies = ", ".join(f"{what.replace('_', ' ')} {rate:.1f}" for what, rate in rates.items())
    return {
        "headline": f"{name}: bfloat16 product {product:.3g} TFLOP/s; GB/s {copies}",
        "device": name,
        "memory_gib": memory,
        "matrix_tflops": product,
        "data_sheet_tflops": MATRIX_RATE.get(name, 0.0) / 1e12 or None,
        "gigabytes_per_second": rates,
    }


def transport(context: Context) -> Figures:
    """Weights to another process on the same device, which verifies every checksum, by each way."""
    ways: tuple[Way, ...] = get_args(Way) if _CUDA else ("pageable",)
    megabytes, bucket_mb = (32, 16) if context.dry_run else (2048, 256)
    records = {way: measure(_DEVICE, way, megabytes, bucket_mb, repeats=3) for way in ways}
    for way, record in records.items():
        assert not record["error"], f"{way}: {record['error']}"
        assert record["way"] == way, f"{way} became {record['way']}: {'; '.join(record['remarks'])}"
    shown = ", ".join(f"{way} {record['gb_per_second']:.2f}" for way, record in records.items())
    return {"headline": f"GB/s {shown}; checksums equal", "ways": records}
