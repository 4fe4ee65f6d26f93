"""SGLang without a model: continuous batching and a radix cache, in virtual time.

The scheduler follows SGLang 0.5.16 with the settings of `sglang_rollout/processes.py`:

- Requests that have arrived are prefilled together before the next decoding step, as far as there is room.
- One step decodes a token for every running request.
- All tokens of a finished request but the last stay in the cache until their room is needed.
- If a step has no room, the request with the fewest tokens is retracted and prefilled again later.

Not modelled: chunks of one prefill (a batch may be longer than a chunk by one context), pages of more than
one token, the slow fall of SGLang's estimate of what running requests still need. Events are requests that
arrive or end, never single tokens. An answer is as long as its request asks for.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_rollout.start_environment import RESERVED_TOKENS
from treepo.errors import EngineError
from treepo.planning.simulation.prefix_cache import Node, PrefixCache
from treepo.planning.simulation.rates import Prefill, Rates
from treepo.protocols import GenerateOutput, GenerateRequest

_RESERVED_FOR_RUNNING = 7  # for each running request: SGLang's estimate falls to a tenth of RESERVED_TOKENS
_TABLE = 1 << 16
_VOCABULARY = 4096


@dataclass(slots=True)
class Counts:
    """Sums since the engine was made.

    steps: decoding steps. request_steps: running requests, summed over the steps. peak_tokens: the most KV
    tokens of running requests at one time.
    """

    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    steps: int = 0
    request_steps: int = 0
    retractions: int = 0
    busy_seconds: float = 0.0
    peak_tokens: int = 0

    @property
    def mean_batch(self) -> float:
        """Requests in a decoding step."""
        return self.request_steps / max(self.steps, 1)


@dataclass(slots=True, eq=False)
class _Job:
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
class _Running:
    """The decoding jobs in a heap of (the step at which it ends, order of joining, job).

    step: number of the last one. kv: tokens that the next step reads. own: of these, tokens that are in no
    cache yet.
    """

    jobs: list[tuple[int, int, _Job]] = field(default_factory=list)
    step: int = 0
    kv: int = 0
    own: int = 0
    joined: int = 0

    def __len__(self) -> int:
        return len(self.jobs)

    def join(self, job: _Job) -> None:
        """After the job's prefill, which has made one token."""
        self.joined += 1
        heapq.heappush(self.jobs, (self.step + job.left, self.joined, job))
        self.kv += len(job.context) + 1

    def until_end(self) -> int:
        """Steps until the next job ends."""
        return self.jobs[0][0] - self.step

    def advance(self, steps: int) -> list[_Job]:
        """Decodes `steps` steps and returns the jobs that have ended."""
        self.step += steps
        self.kv += steps * len(self)
        self.own += steps * len(self)
        ended: list[_Job] = []
        while self.jobs and self.jobs[0][0] == self.step:
            ended.append(self._leave(heapq.heappop(self.jobs)))
        return ended

    def retract(self) -> _Job:
        """Removes the job with the fewest tokens."""
        least = min(self.jobs, key=lambda entry: len(entry[2].tokens) - (entry[0] - self.step))
        self.jobs.remove(least)
        heapq.heapify(self.jobs)
        return self._leave(least)

    def _leave(self, entry: tuple[int, int, _Job]) -> _Job:
        end, _, job = entry
        job.own = job.left - (end - self.step)
        job.made += job.own
        self.kv -= len(job.context) + 1 + job.own
        self.own -= job.own
        return job


class SimulatedEngine:
    """A `treepo.protocols.Engine` on a virtual clock (`virtual_clock.run_virtually`).

    kv_tokens: of the cache. max_requests: that run at once. chunk_tokens: no further request joins a prefill
    that has reached them.
    """

    def __init__(
        self, rates: Rates, kv_tokens: int, max_requests: int = 4096, chunk_tokens: int = 8192
    ) -> None:
        self.counts = Counts()
        self._rates, self._kv_tokens = rates, kv_tokens
        self._max_requests, self._chunk_tokens = max_requests, chunk_tokens
        self._cache = PrefixCache()
        self._waiting: deque[_Job] = deque()
        self._running = _Running()
        self._full = False  # no request is admitted before another ends
        self._serving: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None
        generator = np.random.default_rng(0)
        self._tokens = generator.integers(0, _VOCABULARY, _TABLE, dtype=np.int32)
        self._log_probs = -generator.random(_TABLE, dtype=np.float32)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Exactly `max_tokens` tokens, which depend on the request's seed alone.

        Raises EngineError if the cache cannot hold the request.
        """
        whole = len(request.context) + request.max_tokens
        if whole > self._kv_tokens:
            raise EngineError(f"{whole} tokens do not fit into a KV cache of {self._kv_tokens}")
        await asyncio.sleep(self._rates.latency)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Job(request, _drawn(self._tokens, request), answer, request.context))
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        elif self._wake is not None and not self._full and not self._wake.done():
            self._wake.set_result(None)
        return await answer

    async def _serve(self) -> None:
        while self._waiting or len(self._running):
            batch = self._admit() if self._waiting and not self._full else []
            if batch:
                await self._prefill(batch)
            else:
                await self._decode()
        self._serving = None

    def _admit(self) -> Sequence[_Job]:
        """Takes waiting requests that can be prefilled together, and locks their cached prefixes."""
        batch: list[_Job] = []
        new = wanted = 0
        while self._waiting and new < self._chunk_tokens:
            job = self._waiting[0]
            node, cached = self._cache.match(job.context[:-1])
            self._cache.lock(node)
            computed = len(job.context) - cached
            wanted += computed + min(job.left, RESERVED_TOKENS)
            running = len(batch) + len(self._running)
            room = self._room() - _RESERVED_FOR_RUNNING * running
            if running == self._max_requests or (running and wanted >= room):
                self._cache.unlock(node)
                self._full = True
                break
            self._waiting.popleft()
            job.node, job.cached = node, cached
            if job.made == 0:
                job.reported = cached
            batch.append(job)
            new += computed
        return batch

    async def _prefill(self, batch: Sequence[_Job]) -> None:
        """Computes the contexts, and one token of each job."""
        new = [len(job.context) - job.cached for job in batch]
        self._evict_for(sum(new))
        work = Prefill(
            requests=len(batch),
            new=sum(new),
            context=sum(len(job.context) for job in batch),
            pairs=sum(
                count * job.cached + count * (count + 1) // 2 for count, job in zip(new, batch, strict=True)
            ),
        )
        seconds = self._rates.prefill(work)
        await asyncio.sleep(seconds)
        self.counts.prefilled_tokens += work.new
        self.counts.busy_seconds += seconds
        for job in batch:
            assert job.node is not None
            held = job.node
            job.node, _ = self._cache.insert(job.context)
            self._cache.lock(job.node)
            self._cache.unlock(held)
            job.made += 1
            if job.left:
                self._running.join(job)
            else:
                self._end(job)
        self._note_peak()

    async def _decode(self) -> None:
        """Decodes until a request ends, arrives or has no room."""
        running = self._running
        count = len(running)
        room = self._room()
        if room < count:
            self._retract()
            return
        most = min(running.until_end(), room // count)
        ends = np.cumsum(self._rates.decode(count, running.kv + count * np.arange(most)))
        passed = await self._sleep(float(ends[-1]))
        steps = 1 + int(np.searchsorted(ends, passed))  # the step during which a request arrived is completed
        seconds = float(ends[steps - 1])
        if passed < seconds:
            await asyncio.sleep(seconds - passed)
        self._evict_for(steps * count)
        self.counts.steps += steps
        self.counts.request_steps += steps * count
        self.counts.busy_seconds += seconds
        ended = running.advance(steps)
        self._note_peak(sum(job.own for job in ended))
        for job in ended:
            self._end(job)

    async def _sleep(self, seconds: float) -> float:
        """Sleeps for `seconds` or until a request arrives; returns the seconds that have passed."""
        loop = asyncio.get_running_loop()
        start, self._wake = loop.time(), loop.create_future()
        timer = loop.call_later(seconds, _wake_up, self._wake)
        await self._wake
        timer.cancel()
        self._wake = None
        return min(loop.time() - start, seconds)

    def _end(self, job: _Job) -> None:
        """Answers the request. The KV of its tokens but the last becomes evictable."""
        assert job.node is not None
        self._cache.insert(np.concatenate([job.request.context, job.tokens[:-1]]))
        self._cache.unlock(job.node)
        self._full = False
        self.counts.decoded_tokens += len(job.tokens)
        if not job.answer.done():  # the driver may have cancelled it
            log_probs = _drawn(self._log_probs, job.request)
            job.answer.set_result(GenerateOutput(job.tokens, log_probs, 0, "length", job.reported))

    def _retract(self) -> None:
        job = self._running.retract()
        assert job.node is not None
        self._cache.unlock(job.node)
        job.context = np.concatenate([job.request.context, job.tokens[: job.made]])
        self._waiting.appendleft(job)
        self._full = True
        self.counts.retractions += 1

    def _room(self) -> int:
        """Tokens that are free or can be evicted."""
        return self._kv_tokens - self._cache.locked - self._running.own

    def _evict_for(self, tokens: int) -> None:
        free = self._kv_tokens - self._cache.size - self._running.own
        if free < tokens:
            self._cache.evict(tokens - free)

    def _note_peak(self, ended: int = 0) -> None:
        held = self._cache.locked + self._running.own + ended
        self.counts.peak_tokens = max(self.counts.peak_tokens, held)


def _drawn(table: np.ndarray, request: GenerateRequest) -> np.ndarray:
    """The stretch of `table` that belongs to the request's seed, wrapped round at its end."""
    start = request.seed % _TABLE
    if start + request.max_tokens <= _TABLE:
        return table[start : start + request.max_tokens]
    return np.take(table, np.arange(start, start + request.max_tokens), mode="wrap")


def _wake_up(wake: "asyncio.Future[None]") -> None:
    if not wake.done():
        wake.set_result(None)
