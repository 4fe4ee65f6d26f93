"""Grade batches of responses by the user's own HTTP endpoint: a reward model, a sandbox.

    POST reward.url    {"items": [{"prompt": ..., "response": ..., "answer": ..., "extra": {...}}, ...]}
    200                {"grades": [0.5, {"reward": 1, "correct": true, "style": 0.2}, null, ...]}

One grade for each item, in order: a number, an object as a reward function returns it
(treepo.rewards.custom), or null for an item that the endpoint could not grade. At the start an empty list of
items is sent to check that the endpoint answers. An item without a usable grade after all attempts gets the
verdict `timeout` or `error` and is masked from training.
"""

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from itertools import batched
from types import TracebackType
from typing import Self

import aiohttp

from treepo.config.reward import RewardConfig
from treepo.errors import ConfigError, one_line, shortened
from treepo.rewards.custom import BadGradeError, grade_of
from treepo.rewards.grade import Grade, GradeItem
from treepo.verdict import Verdict

_log = logging.getLogger(__name__)
_AUTHORIZATION = "TREEPO_REWARD_AUTHORIZATION"  # not in the configuration, which is in the run's files
_FIRST_WAIT_SECONDS = 0.5  # doubled after each further attempt
_MOST_BYTES = 2**24  # of a reply
_WORTH_ANOTHER_ATTEMPT = (408, 425, 429)  # and everything from 500 up


class BadReply(Exception):  # noqa: N818 (the user does not see it: it becomes a grade or a ConfigError)
    """A reply without usable grades. transient: whether another attempt may succeed."""

    def __init__(self, message: str, verdict: Verdict = Verdict.ERROR, transient: bool = False) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.transient = transient


class HttpRewards:
    """Grades by `reward.url`, `config.workers` requests at a time. A context manager of one event loop.

    Raises ConfigError if the header for the endpoint cannot be sent.
    """

    def __init__(self, config: RewardConfig) -> None:
        assert config.url is not None
        self._url = config.url
        self._headers = {"Content-Type": "application/json"} | _authorization()
        self._config = config
        self._slots = asyncio.Semaphore(config.workers)
        self._shown: set[str] = set()

    async def __aenter__(self) -> Self:
        # The slots bound the connections: waiting for a slot does not count against the deadline.
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._config.deadline_seconds),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ready(self) -> None:
        """Send an empty batch. Raises ConfigError if the endpoint does not answer it."""
        try:
            await self._request([])
        except BadReply as bad:
            raise ConfigError(f"reward.url = {self._url}: {bad}") from bad

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """Grade the items, in the same order. Raises ConfigError if an item cannot be written as JSON."""
        parts = batched(items, self._config.batch_size)
        return [grade for part in await asyncio.gather(*map(self._grade_batch, parts)) for grade in part]

    async def _grade_batch(self, items: Sequence[GradeItem]) -> list[Grade]:
        try:
            grades = await self._request(items)
        except BadReply as bad:
            grades = [Grade(None, bad.verdict, message=str(bad))] * len(items)
        for grade in grades:
            if grade.message is not None:
                self._show(grade.message)
        return grades

    async def _request(self, items: Sequence[GradeItem]) -> list[Grade]:
        """Send one batch, again if that may help. Raises BadReply once the attempts are used up."""
        body, attempt = _encode(items), 1
        while True:
            try:
                return _decode(await self._post(body), len(items))
            except BadReply as bad:
                if not bad.transient or attempt == self._config.attempts:
                    raise
            await asyncio.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            attempt += 1

    async def _post(self, body: bytes) -> bytes:
        """Return the body of a reply with status 200. Raises BadReply for any other."""
        try:
            async with (
                self._slots,
                self._session.post(self._url, data=body, allow_redirects=False) as response,
            ):
                content = await _read(response)
        except TimeoutError as error:
            message = f"no reply within {self._config.deadline_seconds:g} s"
            raise BadReply(message, Verdict.TIMEOUT, transient=True) from error
        except (aiohttp.ClientError, OSError) as error:
            said = shortened(str(error) or type(error).__name__, 200)
            raise BadReply(f"no reply: {said}", transient=True) from error
        if 300 <= response.status < 400:
            to = shortened(response.headers.get("Location", "nowhere"))
            raise BadReply(f"HTTP {response.status}: it redirects to {to}, which is not followed")
        if response.status != 200:
            transient = response.status >= 500 or response.status in _WORTH_ANOTHER_ATTEMPT
            said = one_line(content[:200].decode(errors="replace"))
            raise BadReply(f"HTTP {response.status}: {said}", transient=transient)
        return content

    def _show(self, message: str) -> None:
        """Log the first failure of each kind only: a broken endpoint fails on every batch."""
        kind = message.partition(":")[0]
        if kind not in self._shown:
            self._shown.add(kind)
            _log.error("%s: %s (shown once; such responses are masked from training)", self._url, message)


def _authorization() -> dict[str, str]:
    """The header that lets the run in, if there is one. A file of a secret often ends with a line break."""
    value = os.environ.get(_AUTHORIZATION, "").strip()
    if not value.isprintable():  # the message must not show it
        raise ConfigError(
            f"{_AUTHORIZATION} contains a line break or another character that does not print; "
            "a header must be one line of text"
        )
    return {"Authorization": value} if value else {}


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body of a reply. Raises BadReply if it is too long."""
    content = bytearray()
    async for part in response.content.iter_chunked(2**16):
        content += part
        if len(content) > _MOST_BYTES:
            response.close()
            raise BadReply(f"its reply is longer than {_MOST_BYTES >> 20} MiB")
    return bytes(content)


def _encode(items: Sequence[GradeItem]) -> bytes:
    records = [
        {"prompt": item.prompt, "response": item.response, "answer": item.answer, "extra": dict(item.extra)}
        for item in items
    ]
    try:
        return json.dumps({"items": records}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"data.columns.extra holds what JSON cannot: {error}; reward.url needs it"
        ) from error


def _decode(content: bytes, count: int) -> list[Grade]:
    """Read the grades of `count` items from a reply. Raises BadReply."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadReply(f"its reply is not JSON: {error}") from error
    grades = reply.get("grades") if isinstance(reply, dict) else None
    if not isinstance(grades, list):
        raise BadReply('its reply is no object with a list "grades"')
    if len(grades) != count:
        raise BadReply(f"it returned {len(grades)} grades for {count} responses")
    return [_grade(value) for value in grades]


def _grade(value: object) -> Grade:
    if value is None:
        return Grade(None, Verdict.ERROR, message="it returned null, no grade, for a response")
    try:
        return grade_of(value)
    except BadGradeError as error:
        return Grade(None, Verdict.ERROR, message=str(error))
