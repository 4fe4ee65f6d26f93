"""SGLang without a model: continuous batching and a radix cache, in virtual time.

What is modelled: requests that have arrived are prefilled together before the next decoding step, as far as
there is room; one step decodes a token for every running request; a finished request's tokens but the last
stay in the cache until their room is needed; where a step has no room, the request that has least is put off
and prefilled once more. The scheduler's rules are those of SGLang 0.5.16 with the settings of
`sglang_rollout/server.py`. What is not: chunks of one prefill (a batch may be longer than a chunk by one
context), pages of more than one token, the slow fall of SGLang's estimate of what running requests still
need. An event is a request that comes or ends, never a token. Lengths are those that are asked for.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from treepo.errors import EngineError
from treepo.planning.simulation.prefix_cache import Node, PrefixCache
from treepo.planning.simulation.rates import Prefill, Rates, steps_seconds, whole_steps
from treepo.protocols import GenerateOutput, GenerateRequest

_RESERVED_TOKENS = 64  # for what a new request may sample (sglang_rollout/server.py)
_RESERVED_RUNNING = 7  # of those for each running one: SGLang's estimate falls to a tenth of them
_TABLE = 1 << 16
_VOCABULARY = 4096


@dataclass(slots=True)
class Counts:
    """Sums since the engine was made. steps: of decoding. request_steps: running requests, summed over them.
    peak_tokens: most KV tokens that running requests had at one time.
    """

    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    prefills: int = 0
    steps: int = 0
    request_steps: int = 0
    retractions: int = 0
    busy_seconds: float = 0.0
    peak_tokens: int = 0

    @property
    def mean_batch(self) -> float:
        """Requests that one decoding step decodes for."""
        return self.request_steps / max(self.steps, 1)


@dataclass(slots=True, eq=False)
class _Job:
    """A request. context: what is in the cache before it decodes, with the tokens that it had when it was put
    off. made: tokens so far. own: of those, tokens whose KV no cache has yet. cached: of its context, when it
    was prefilled last; reported: when it was prefilled first. node: the cache's, locked while it runs.
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
    """The jobs that decode, by the step at which they end. step: number of the last one. kv: tokens that the
    next step reads. own: of these, what is in no cache yet.
    """

    jobs: list[tuple[int, int, _Job]] = field(default_factory=list)
    step: int = 0
    kv: int = 0
    own: int = 0
    joined: int = 0

    def __len__(self) -> int:
        return len(self.jobs)

    def join(self, job: _Job) -> None:
        """After its prefill, which has made a token."""
        self.joined += 1
        heapq.heappush(self.jobs, (self.step + job.left, self.joined, job))
        self.kv += len(job.context) + 1

    def until_end(self) -> int:
        """Steps until the next job ends."""
        return self.jobs[0][0] - self.step

    def advance(self, steps: int) -> list[_Job]:
        """Decode; returns who has ended."""
        self.step += steps
        self.kv += steps * len(self)
        self.own += steps * len(self)
        ended: list[_Job] = []
        while self.jobs and self.jobs[0][0] == self.step:
            ended.append(self._leave(heapq.heappop(self.jobs)))
        return ended

    def put_off(self) -> _Job:
        """The job that has least leaves."""
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
    """Implements `treepo.protocols.Engine` on a virtual clock (`virtual_clock.run_virtually`).

    kv_tokens: of the cache. max_requests: that run at once. chunk_tokens: of a prefill, after which no
    further request is added to it. Raises EngineError for a request that the cache cannot hold.
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
        self._full = False  # nothing more is admitted before a request ends
        self._serving: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None
        generator = np.random.default_rng(0)
        self._table = generator.integers(0, _VOCABULARY, _TABLE, dtype=np.int32)
        self._scores = -generator.random(_TABLE, dtype=np.float32)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Exactly `max_tokens` tokens, which only the request's seed decides."""
        whole = len(request.context) + request.max_tokens
        if whole > self._kv_tokens:
            raise EngineError(f"{whole} tokens do not fit into a KV cache of {self._kv_tokens}")
        await asyncio.sleep(self._rates.latency)
        answer = asyncio.get_running_loop().create_future()
        job = _Job(request, self._drawn(self._table, request), answer, request.context)
        self._waiting.append(job)
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        elif self._wake is not None and not self._full and not self._wake.done():
            self._wake.set_result(None)
        return await answer

    def _drawn(self, table: np.ndarray, request: GenerateRequest) -> np.ndarray:
        """A stretch of `table` that belongs to the request's seed; what is longer goes round."""
        start = request.seed % _TABLE
        if start + request.max_tokens <= _TABLE:
            return table[start : start + request.max_tokens]
        return np.take(table, np.arange(start, start + request.max_tokens), mode="wrap")

    async def _serve(self) -> None:
        while self._waiting or len(self._running):
            batch = self._admit() if self._waiting and not self._full else []
            if batch:
                await self._prefill(batch)
            else:
                await self._decode()
        self._serving = None

    def _admit(self) -> Sequence[_Job]:
        """Waiting requests that can be prefilled together; they hold what is cached of their contexts."""
        batch: list[_Job] = []
        new = wanted = 0
        while self._waiting and new < self._chunk_tokens:
            job = self._waiting[0]
            node, cached = self._cache.match(job.context[:-1])
            self._cache.lock(node)
            computed = len(job.context) - cached
            wanted += computed + min(job.left, _RESERVED_TOKENS)
            running = len(batch) + len(self._running)
            room = self._kv_tokens - self._cache.locked - self._running.own - _RESERVED_RUNNING * running
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
        """Compute the contexts, and a token for each."""
        new = [len(job.context) - job.cached for job in batch]
        self._make_room(sum(new))
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
        self.counts.prefills += 1
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
        """Steps until a request ends, comes, or has no room."""
        running, cache = self._running, self._cache
        count = len(running)
        room = self._kv_tokens - cache.locked - running.own
        if room < count:
            self._put_off()
            return
        most = min(running.until_end(), room // count)
        lines = self._rates.decode(count)
        steps, seconds = most, steps_seconds(lines, running.kv, count, most)
        passed = await self._sleep(seconds)
        if passed < seconds:
            steps = whole_steps(lines, running.kv, count, most, passed)
            seconds = steps_seconds(lines, running.kv, count, steps)
            await asyncio.sleep(seconds - passed)
        self._make_room(steps * count)
        self.counts.steps += steps
        self.counts.request_steps += steps * count
        self.counts.busy_seconds += seconds
        ended = running.advance(steps)
        self._note_peak(sum(job.own for job in ended))
        for job in ended:
            self._end(job)

    async def _sleep(self, seconds: float) -> float:
        """Until they have passed or a request has come; returns how many have passed."""
        loop = asyncio.get_running_loop()
        start, self._wake = loop.time(), loop.create_future()
        timer = loop.call_later(seconds, _wake_up, self._wake)
        await self._wake
        timer.cancel()
        self._wake = None
        return min(loop.time() - start, seconds)

    def _end(self, job: _Job) -> None:
        """Answer. Its tokens but the last stay in the cache until their room is needed."""
        assert job.node is not None
        self._cache.insert(np.concatenate([job.request.context, job.tokens[:-1]]))
        self._cache.unlock(job.node)
        self._full = False
        self.counts.decoded_tokens += len(job.tokens)
        if not job.answer.done():  # the driver may have cancelled it
            scores = self._drawn(self._scores, job.request)
            output = GenerateOutput(job.tokens, scores, 0, "length", job.reported)
            job.answer.set_result(output)

    def _put_off(self) -> None:
        job = self._running.put_off()
        assert job.node is not None
        self._cache.unlock(job.node)
        job.context = np.concatenate([job.request.context, job.tokens[: job.made]])
        self._waiting.appendleft(job)
        self._full = True
        self.counts.retractions += 1

    def _make_room(self, tokens: int) -> None:
        """Evict what `tokens` more need."""
        free = self._kv_tokens - self._cache.size - self._running.own
        if free < tokens:
            self._cache.evict(tokens - free)

    def _note_peak(self, ended: int = 0) -> None:
        held = self._cache.locked + self._running.own + ended
        self.counts.peak_tokens = max(self.counts.peak_tokens, held)


def _wake_up(wake: "asyncio.Future[None]") -> None:
    if not wake.done():
        wake.set_result(None)
