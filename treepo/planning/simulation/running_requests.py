"""The requests inside a simulated engine: what each has, which decode together, and sums over all of them."""

import asyncio
import heapq
from dataclasses import dataclass, field

import numpy as np

from treepo.planning.simulation.prefix_cache import Node
from treepo.protocols import GenerateOutput, GenerateRequest


@dataclass(slots=True)
class Counts:
    """Sums since the engine was made.

    steps: decoding steps. request_steps: running requests, summed over the steps. interrupted: requests.
    busy_seconds: of prefills and decoding steps. peak_tokens: the most KV tokens of running requests at one
    time.
    """

    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    steps: int = 0
    request_steps: int = 0
    retractions: int = 0
    interrupted: int = 0
    busy_seconds: float = 0.0
    peak_tokens: int = 0

    @property
    def mean_batch(self) -> float:
        """Requests in a decoding step."""
        return self.request_steps / max(self.steps, 1)


@dataclass(slots=True, eq=False)
class Job:
    """A request in the engine.

    context: tokens in the cache before it decodes; after a retraction, with the tokens that it had by then.
    made: tokens so far. own: of those, tokens whose KV is in no cache yet. cached: tokens of the context that
    the last prefill found in the cache; reported: that the first one found. node: the cache's, locked while
    the job runs.
    """

    request: GenerateRequest
    tokens: np.ndarray
    answer: asyncio.Future[GenerateOutput]
    context: np.ndarray
    made: int = 0
    own: int = 0
    cached: int = 0
    reported: int = 0
    node: Node | None = None

    @property
    def left(self) -> int:
        return len(self.tokens) - self.made


@dataclass(slots=True, eq=False)
class Running:
    """The decoding jobs in a heap of (the step at which it ends, order of joining, job).

    step: number of the last one. kv: tokens that the next step reads. own: of these, tokens that are in no
    cache yet.
    """

    jobs: list[tuple[int, int, Job]] = field(default_factory=list)
    step: int = 0
    kv: int = 0
    own: int = 0
    joined: int = 0

    def __len__(self) -> int:
        return len(self.jobs)

    def join(self, job: Job) -> None:
        """After the job's prefill, which has made one token."""
        self.joined += 1
        heapq.heappush(self.jobs, (self.step + job.left, self.joined, job))
        self.kv += len(job.context) + 1

    def until_end(self) -> int:
        """Steps until the next job ends."""
        return self.jobs[0][0] - self.step

    def advance(self, steps: int) -> list[Job]:
        """Decodes `steps` steps and returns the jobs that have ended."""
        self.step += steps
        self.kv += steps * len(self)
        self.own += steps * len(self)
        ended: list[Job] = []
        while self.jobs and self.jobs[0][0] == self.step:
            ended.append(self._leave(heapq.heappop(self.jobs)))
        return ended

    def leave_all(self) -> list[Job]:
        """Removes every job, in the order in which they would have ended."""
        left = [self._leave(entry) for entry in sorted(self.jobs)]
        self.jobs = []
        return left

    def retract(self) -> Job:
        """Removes the job with the fewest tokens."""
        least = min(self.jobs, key=lambda entry: len(entry[2].tokens) - (entry[0] - self.step))
        self.jobs.remove(least)
        heapq.heapify(self.jobs)
        return self._leave(least)

    def _leave(self, entry: tuple[int, int, Job]) -> Job:
        end, _, job = entry
        job.own = job.left - (end - self.step)
        job.made += job.own
        self.kv -= len(job.context) + 1 + job.own
        self.own -= job.own
        return job
