"""Runs a command as a job of a Ray cluster: submits, follows and stops it through the job server."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors, list_nodes, list_placement_groups
from ray.util.state.common import RAY_MAX_LIMIT_FROM_API_SERVER
from ray.util.state.exception import RayStateApiException

from treepo.cluster.placement import Node
from treepo.data.daemon_thread import in_thread
from treepo.errors import ClusterError, LostJobError, StoppedJobError, one_line

STOP_SECONDS = 40
"""From Ctrl-C to SIGKILL: longer than an engine takes to end, and less than `ending.CLEANUP_SECONDS`, in
which the launch must end too.
"""

_POLL_SECONDS = 0.5
_CLEAR_SECONDS = 60.0  # for Ray to end the actors of a job that has ended
_SILENCE_SECONDS = 60.0  # after which a job server that does not answer counts as gone
_ANSWER_SECONDS = 30.0  # for one answer, which Ray's client would await for ever
_LOOK_SECONDS = 30.0  # between two looks at a job whose output is followed
# What Ray's client raises if the server does not answer, or answers nonsense.
_UNREACHABLE = (RuntimeError, OSError, ClientError)
_log = logging.getLogger(__name__)
# Of the job. A run cleans up on SIGINT, as at a terminal.
_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}


class JobServer:
    """A cluster's job server. url: its address; None takes the cluster that RAY_ADDRESS names."""

    def __init__(self, url: str | None, client: JobSubmissionClient) -> None:
        self._url, self._client = url, client
        self._warned = ""
        self._job = ""  # the last that was submitted
        self._written = 0  # characters of its output

    async def nodes(self) -> list[Node]:
        """The living nodes with their total resources; none while the server cannot list them yet."""
        try:
            states: list[Any] = await _answer(
                lambda: list_nodes(self._url, detail=True, limit=RAY_MAX_LIMIT_FROM_API_SERVER)
            )
        except (RayStateApiException, OSError) as error:
            if (text := one_line(error)) != self._warned:
                self._warned = text
                _log.warning("Ray's nodes: %s", text)
            return []
        return [
            Node(
                state.node_id,
                state.node_ip,
                int(state.resources_total.get("CPU", 0)),
                int(state.resources_total.get("GPU", 0)),
            )
            for state in states
            if state.state == "ALIVE"
        ]

    async def run(self, command: str, write: Callable[[str], None]) -> int:
        """Run a shell command, pass its output to `write`, and return its exit code as a shell does: 128 and
        the signal's number if a signal ended it.

        If cancelled, stop the job and wait for its end. Raises LostJobError if Ray loses the job, and
        StoppedJobError if somebody stops it.
        """
        submitting = asyncio.ensure_future(
            _answer(
                lambda: self._client.submit_job(entrypoint=command, runtime_env={"env_vars": _ENVIRONMENT})
            )
        )
        following = asyncio.ensure_future(self._follow(submitting, write))
        try:
            return await asyncio.shield(following)
        except asyncio.CancelledError:
            # If the server is gone, so is the job.
            with suppress(TimeoutError, ClusterError, *_UNREACHABLE):
                job = await submitting
                await _answer(lambda: self._client.stop_job(job))
                await asyncio.wait_for(asyncio.shield(following), STOP_SECONDS + 5)
            raise
        finally:
            following.cancel()

    async def _follow(self, submitting: "asyncio.Future[str]", write: Callable[[str], None]) -> int:
        try:
            job = await asyncio.shield(submitting)
        except _UNREACHABLE as error:
            raise ClusterError(f"Ray does not accept the job: {one_line(error)}") from None
        self._job, self._written = job, 0
        while True:
            await self._tail_while_server_answers(job, write)
            info = await _query(self._client.get_job_info, job)
            if info.status.is_terminal():
                break
            await asyncio.sleep(_POLL_SECONDS)
        # If the stream broke, the last lines are missing.
        write((await _query(self._client.get_job_logs, job))[self._written :])
        if info.status is JobStatus.STOPPED:
            raise StoppedJobError(f"the job {job} was stopped")
        if info.driver_exit_code is None:
            reason = one_line(info.message or "Ray does not say why")
            raise LostJobError(f"Ray lost the job {job}: {reason}")
        code = info.driver_exit_code
        return code if code >= 0 else 128 - code

    async def end_job(self) -> None:
        """End what is left of the last job, if there was one: its process, actors and placement groups.

        Raises ClusterError if they are still there after `STOP_SECONDS` and `_CLEAR_SECONDS`.
        """
        deadline = time.monotonic() + STOP_SECONDS + _CLEAR_SECONDS
        while self._job:
            try:
                left = await _answer(self._stop_and_list)
            except (RayStateApiException, *_UNREACHABLE) as error:
                left = f"the job server does not answer: {one_line(error)}"
            if not left:
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"the job {self._job} does not end: {left}")
            await asyncio.sleep(_POLL_SECONDS)

    def _stop_and_list(self) -> str:
        """What is left of the last job; empty if nothing is."""
        info = self._client.get_job_info(self._job)
        if not info.status.is_terminal():
            self._client.stop_job(self._job)
            return "its process runs"
        if info.job_id is None:  # it never joined Ray
            return ""
        options: Any = {"address": self._url, "limit": RAY_MAX_LIMIT_FROM_API_SERVER}
        actors: list[Any] = list_actors(
            filters=[("job_id", "=", info.job_id), ("state", "!=", "DEAD")], **options
        )
        groups: list[Any] = list_placement_groups(
            filters=[("creator_job_id", "=", info.job_id), ("state", "!=", "REMOVED")], **options
        )
        return f"{len(actors)} actors, {len(groups)} placement groups" if actors or groups else ""

    async def _tail_while_server_answers(self, job: str, write: Callable[[str], None]) -> None:
        """Follow the job's output until its stream ends or breaks, or the job has ended.

        Raises LostJobError if the server stops answering, which a stream does not show.
        """
        tail = asyncio.ensure_future(self._tail(job, write))
        try:
            while not (await asyncio.wait((tail,), timeout=_LOOK_SECONDS))[0]:
                if (await _query(self._client.get_job_info, job)).status.is_terminal():
                    await asyncio.wait((tail,), timeout=_LOOK_SECONDS)
                    return
            tail.result()
        finally:
            tail.cancel()
            await asyncio.wait((tail,))

    async def _tail(self, job: str, write: Callable[[str], None]) -> None:
        """Write the job's output after its first `_written` characters, until the stream ends or breaks."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(job):
                seen += len(text)
                if seen > self._written:
                    write(text[self._written - seen :])
                    self._written = seen
        except _UNREACHABLE as error:
            _log.info("the stream of the log of %s broke: %s", job, error)


async def _answer[T](call: Callable[[], T]) -> T:
    """Return what Ray's client returns. Raises TimeoutError after `_ANSWER_SECONDS`."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            return await in_thread(call)
    except TimeoutError as error:
        raise TimeoutError(one_line(error) or f"no answer within {_ANSWER_SECONDS:g} s") from None


async def _query[T](call: Callable[[str], T], job: str) -> T:
    """Return the job server's answer. Raises LostJobError if none comes within `_SILENCE_SECONDS`."""
    deadline = time.monotonic() + _SILENCE_SECONDS
    while True:
        try:
            return await _answer(lambda: call(job))
        except _UNREACHABLE as error:
            if time.monotonic() > deadline:
                reason = one_line(error)
                raise LostJobError(
                    f"Ray's job server has not answered for {_SILENCE_SECONDS:g} s: {reason}"
                ) from None
        await asyncio.sleep(_POLL_SECONDS)


async def job_server(url: str | None, seconds: float) -> JobServer:
    """Wait until the job server answers. Raises ClusterError after `seconds`, and if it refuses access."""
    # Ray's client logs the end of every stream.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    deadline = time.monotonic() + seconds
    while True:
        try:
            return JobServer(url, await _answer(lambda: JobSubmissionClient(url)))
        except AuthenticationError as error:
            raise ClusterError(f"Ray's job server refuses: {one_line(error)}") from None
        except _UNREACHABLE as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no answer from Ray's job server within {seconds:g} s: {one_line(error)}"
                ) from None
        await asyncio.sleep(_POLL_SECONDS)
