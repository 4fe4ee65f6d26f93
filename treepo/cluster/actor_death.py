"""Says why a Ray actor died: what Ray knows, and the last lines that its process wrote to standard error.

Ray adds guesses to the death of every process, the kernel's OOM killer first. They are left out: memory is
named only if Ray or the kernel has killed for it.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treepo.cluster.ray_logs import log_folder
from treepo.errors import one_line, shortened, without_colors
from treepo.processes import how_ended
from treepo.stack_dumps import heed_requests

_READ_SECONDS = 15.0  # for another node to start a process and read the file
_LINES = 5
_TAIL_BYTES = 1 << 16
_GUESSES = re.compile(r"(There are some potential root causes|Some common causes include).*", re.DOTALL)
_NO_NEWS = "Worker unexpectedly exits with a connection error code 2. End of file."  # it ended, somehow
_PID = re.compile(r"^\s*pid: (\d+)$", re.MULTILINE)
_ADDRESS = re.compile(r"^\s*ip: (\S+)$", re.MULTILINE)
_DETAIL = re.compile(r"Worker exit detail: (.*)", re.DOTALL)
_KILLS = "treepo: processes that the kernel has killed for memory so far: "
# Lines that say nothing of the cause: Ray's own first lines, native stacks, lists of modules, and the
# underlines of a traceback.
_NOISE = re.compile(
    r":job_id:|:actor_name:|\s+@ |\[.*logging\.cc:\d+\]|Extension modules:|Stack \(most recent|[\s~^]+$"
)
_FATAL = "Fatal Python error: "


_MEMORY_KILLS = re.compile(r"since its start the kernel of that machine has killed (\d+) processes")


def without_guesses(text: str) -> str:
    """Ray's message in one line, without the causes that it guesses."""
    return one_line(_GUESSES.sub("", text))


def note_start() -> None:
    """Note in this process's log how often the kernel has killed for memory, so that a later kill shows. On
    request the stacks of its threads are written there too.
    """
    heed_requests()
    print(f"{_KILLS}{kernel_kills()}", file=sys.stderr, flush=True)  # noqa: T201  this stream is the log


async def death_of(error: RayActorError) -> str:
    """Why the actor died, in one line; waits for another node's answer if it was there."""
    pid, address = _found(_PID, error), _found(_ADDRESS, error)
    reason = _reason(error, pid, address)
    if pid is None or address is None:
        return reason
    try:
        said = await _last_lines(int(pid), address)
    except (RayError, OSError, TimeoutError) as failure:
        said = f"its log cannot be read: {shortened(str(failure) or type(failure).__name__)}"
    return f"{reason}; {said}"


def death_without_lines(error: RayActorError) -> str:
    """As `death_of`, at once."""
    return _reason(error, _found(_PID, error), _found(_ADDRESS, error))


def _found(pattern: re.Pattern[str], error: RayActorError) -> str | None:
    match = pattern.search(str(error))
    return None if match is None else match[1]


def _reason(error: RayActorError, pid: str | None, address: str | None) -> str:
    text = str(error)
    detail = _DETAIL.search(text)
    if pid is None or detail is None:
        return f"it died: {_first_and_last(text)}"
    process = f"its process {pid} on {address} ended"
    if "NODE_OUT_OF_MEMORY" in text:
        return f"{process}: Ray killed it because its machine ran short of memory"
    told = without_guesses(detail[1])
    return process if told in ("", _NO_NEWS) else f"{process}: {told}"


def _first_and_last(text: str) -> str:
    """What Ray says, without the traceback between its first line and its last."""
    lines = [line.strip() for line in without_colors(_GUESSES.sub("", text)).splitlines() if line.strip()]
    if not lines:
        return "Ray does not say why"
    return one_line(" ".join(lines) if "Traceback" not in text else f"{lines[0]} {lines[-1]}")


async def _last_lines(pid: int, address: str) -> str:
    if address == ray.util.get_node_ip_address():
        return last_lines(log_folder(), pid)
    node = next(
        (node for node in ray.nodes() if node["NodeManagerAddress"] == address and node["Alive"]), None
    )
    if node is None:
        return "its machine has left the cluster"
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    read: Any = ray.remote(_read_there).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return await asyncio.wait_for(read.remote(pid), _READ_SECONDS)


def _read_there(pid: int) -> str:
    return last_lines(log_folder(), pid)


def last_lines(logs: Path, pid: int) -> str:
    """What the process's log says of its end, in one line. logs: the folder of Ray's logs on its node."""
    files = sorted(logs.glob(f"worker-*-{pid}.err"), key=lambda file: file.stat().st_mtime)
    return last_lines_of(files[-1]) if files else "it has left no log"


def own_last_lines(children: Iterable[int]) -> str:
    """As `last_lines`, of this process's own log, after how each of its child processes ended."""
    ends = [f"process {child} {end}" for child in children if (end := how_ended(child))]
    return "; ".join([*ends, last_lines_of(Path(os.readlink("/proc/self/fd/2")))])


def last_lines_of(path: Path) -> str:
    """What a log says of a process's end, in one line."""
    if not path.is_file():  # a terminal
        return "its output is not in a file"
    with path.open("rb") as file:
        head = file.read(_TAIL_BYTES)
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        tail = file.read()
    before = re.search(re.escape(_KILLS) + r"(\d+)", head.decode(errors="replace"))
    lines = [
        line
        for line in tail.decode(errors="replace").splitlines()
        if line.strip() and not _NOISE.match(line) and not line.startswith(_KILLS)
    ]
    fatal = next((index for index, line in enumerate(lines) if line.startswith(_FATAL)), None)
    chosen = lines[-_LINES:] if fatal is None else lines[fatal : fatal + _LINES]
    said = " | ".join(shortened(line.strip(), 200) for line in chosen)
    words = f"its last lines: {said}" if said else "it wrote nothing to standard error"
    kills = kernel_kills() - int(before[1]) if before else 0
    if kills > 0:
        words += f"; since its start the kernel of that machine has killed {kills} processes for memory"
    return f"{words} ({path})"


def memory_kills(death: str) -> int:
    """How many processes the kernel had killed for memory between the actor's start and `death_of` it."""
    match = _MEMORY_KILLS.search(death)
    return int(match[1]) if match else 0


def kernel_kills() -> int:
    """How many processes this machine's kernel has killed for memory so far; 0 if unknown."""
    try:
        counts = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    match = re.search(r"^oom_kill (\d+)$", counts, re.MULTILINE)
    return int(match[1]) if match else 0
