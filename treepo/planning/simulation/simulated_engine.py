"""SGLang without a model: continuous batching and a radix cache, in virtual time.

The scheduler follows SGLang 0.5.16 with the settings of `sglang_rollout/processes.py`:

- Requests that have arrived are prefilled together before the next decoding step, as far as there is room.
- One step decodes a token for every running request.
- All tokens of a finished request but the last stay in the cache until their room is needed.
- If a step has no room, the request with the fewest tokens is retracted and prefilled again later.
- A hold or an update interrupts running requests after the pass in progress. Those that have tokens are
  answered with them, the others wait. An update empties the cache: no prefix of other weights is found.

Not modelled: chunks of one prefill (a batch may be longer than a chunk by one context), pages of more than
one token, the slow fall of SGLang's estimate of what running requests still need. Events are requests that
arrive or end, never single tokens. An answer is as long as its request asks for, unless it is interrupted.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

import numpy as np

from sglang_rollout.start_environment import RESERVED_TOKENS
from treepo.errors import EngineError
from treepo.planning.simulation.prefix_cache import PrefixCache
from treepo.planning.simulation.rates import Prefill, Rates
from treepo.planning.simulation.running_requests import Counts, Job, Running
from treepo.protocols import GenerateOutput, GenerateRequest

_RESERVED_FOR_RUNNING = 7  # for each running request: SGLang's estimate falls to a tenth of RESERVED_TOKENS
_TABLE = 1 << 16
_VOCABULARY = 4096


class SimulatedEngine:
    """A `treepo.protocols.Engine` on a virtual clock (`virtual_clock.run_virtually`).

    kv_tokens: of the cache. max_requests: that run at once. chunk_tokens: no further request joins a prefill
    that has reached them. version: of the weights that it serves.
    """

    def __init__(
        self, rates: Rates, kv_tokens: int, max_requests: int = 4096, chunk_tokens: int = 8192
    ) -> None:
        self.counts = Counts()
        self.version = 0
        self._rates, self._kv_tokens = rates, kv_tokens
        self._max_requests, self._chunk_tokens = max_requests, chunk_tokens
        self._cache = PrefixCache()
        self._waiting: deque[Job] = deque()
        self._running = Running()
        self._full = False  # no request is admitted before another ends
        self._held = False
        self._next_version: int | None = None  # during an update
        self._serving: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None
        generator = np.random.default_rng(0)
        self._tokens = generator.integers(0, _VOCABULARY, _TABLE, dtype=np.int32)
        self._log_probs = -generator.random(_TABLE, dtype=np.float32)

    async def generate(self, request: GenerateRequest) -> GenerateOutput:
        """Exactly `max_tokens` tokens, or fewer if they are interrupted; they depend on the seed alone.

        Raises EngineError if the cache cannot hold the request.
        """
        whole = len(request.context) + request.max_tokens
        if whole > self._kv_tokens:
            raise EngineError(f"{whole} tokens do not fit into a KV cache of {self._kv_tokens}")
        await asyncio.sleep(self._rates.latency)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(Job(request, _drawn(self._tokens, request), answer, request.context))
        if self._serving is None:
            self._serve_waiting()
        elif not self._full:
            self._end_sleep()
        return await answer

    async def hold(self) -> None:
        """Interrupt running requests; return once none runs. Later requests wait until `release`."""
        self._held = True
        await self._stop()

    def release(self) -> None:
        self._held = False
        self._serve_waiting()

    async def begin(self, version: int) -> None:
        """Begin an update to weights of this version; like `hold`, until `commit`."""
        assert self._next_version is None
        self._next_version = version
        await self._stop()

    def commit(self) -> None:
        """Serve the weights of the update, with an empty cache."""
        assert self._next_version is not None
        self.version, self._next_version = self._next_version, None
        self._cache = PrefixCache()
        self._serve_waiting()

    @property
    def _shut(self) -> bool:
        return self._held or self._next_version is not None

    async def _stop(self) -> None:
        self._end_sleep()
        if self._serving is not None:
            await asyncio.shield(self._serving)

    def _serve_waiting(self) -> None:
        if self._serving is None and self._waiting and not self._shut:
            self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while not self._shut and (self._waiting or len(self._running)):
            batch = self._admit() if self._waiting and not self._full else []
            if batch:
                await self._prefill(batch)
            else:
                await self._decode()
        if self._shut:
            self._interrupt()
        self._serving = None

    def _admit(self) -> Sequence[Job]:
        """Takes waiting requests that can be prefilled together, and locks their cached prefixes."""
        batch: list[Job] = []
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

    async def _prefill(self, batch: Sequence[Job]) -> None:
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
        """Decodes until a request ends, arrives, is interrupted or has no room."""
        running = self._running
        count = len(running)
        room = self._room()
        if room < count:
            self._retract()
            return
        most = min(running.until_end(), room // count)
        ends = np.cumsum(self._rates.decode(count, running.kv + count * np.arange(most)))
        passed = await self._sleep(float(ends[-1]))
        steps = 1 + int(np.searchsorted(ends, passed))  # the step in progress is completed
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
        """Sleeps for `seconds` or until `_end_sleep`; returns the seconds that have passed."""
        loop = asyncio.get_running_loop()
        start, self._wake = loop.time(), loop.create_future()
        timer = loop.call_later(seconds, _wake_up, self._wake)
        await self._wake
        timer.cancel()
        self._wake = None
        return min(loop.time() - start, seconds)

    def _end_sleep(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _end(self, job: Job) -> None:
        """Answers the request. The KV of its tokens but the last becomes evictable."""
        assert job.node is not None
        self._cache.insert(np.concatenate([job.request.context, job.tokens[: job.made - 1]]))
        self._cache.unlock(job.node)
        self._full = False
        self._answer(job)

    def _interrupt(self) -> None:
        """Answers every request that has tokens, retracted ones too."""
        for job in self._running.leave_all():
            self._end(job)
        begun = [job for job in self._waiting if job.made]
        self._waiting = deque(job for job in self._waiting if not job.made)
        self._full = False
        for job in begun:
            self._answer(job)

    def _answer(self, job: Job) -> None:
        self.counts.decoded_tokens += job.made
        self.counts.interrupted += job.left > 0
        if not job.answer.done():  # the driver may have cancelled it
            tokens, log_probs = job.tokens[: job.made], _drawn(self._log_probs, job.request)[: job.made]
            finish = "interrupted" if job.left else "length"
            job.answer.set_result(GenerateOutput(tokens, log_probs, self.version, finish, job.reported))

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
