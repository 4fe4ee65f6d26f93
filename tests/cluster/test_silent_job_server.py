"""A job server that is stopped, as a process can be, ends a launch's waits for it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from treepo.cluster import ray_job
from treepo.cluster.ray_job import JobServer, job_server
from treepo.errors import ClusterError, LostJobError

NEVER = threading.Event()


class StoppingClient:
    """Ray's client of a server that answers nothing any more from the call `silent` on.

    Answers may take their time until then, as on a busy machine; only the silent call is not waited for.
    """

    def __init__(self, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._silent, self._monkeypatch = silent, monkeypatch
        self._before("submit_job")

    def submit_job(self, **_: object) -> str:
        self._wait("submit_job")
        self._before("get_job_info")
        return "job"

    def get_job_info(self, _job: str) -> Any:
        self._wait("get_job_info")
        return SimpleNamespace(status=JobStatus.SUCCEEDED, driver_exit_code=0)

    def get_job_logs(self, _job: str) -> str:
        return "first last"

    async def tail_job_logs(self, _job: str) -> AsyncIterator[str]:
        yield "first"
        await asyncio.Event().wait()

    def _before(self, call: str) -> None:
        if call == self._silent:
            for name in ("_ANSWER_SECONDS", "_SILENCE_SECONDS"):
                self._monkeypatch.setattr(ray_job, name, 0.02)

    def _wait(self, call: str) -> None:
        if call == self._silent:
            NEVER.wait()


def run(silent: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    for name in ("_LOOK_SECONDS", "_POLL_SECONDS"):
        monkeypatch.setattr(ray_job, name, 0.02)
    client: Any = StoppingClient(silent, monkeypatch)
    return asyncio.run(JobServer(None, client).run("true", said.append))


def test_a_stream_that_stops_does_not_hide_the_end_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert run("nothing", said, monkeypatch) == 0
    assert "".join(said) == "first last"


def test_a_server_that_stops_answering_loses_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LostJobError, match=r"has not answered for 0.02 s: no answer within 0.02 s"):
        run("get_job_info", [], monkeypatch)


def test_a_server_that_never_accepts_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="does not accept the job: no answer within"):
        run("submit_job", [], monkeypatch)


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_job, "JobSubmissionClient", lambda _: NEVER.wait())
    with pytest.raises(ClusterError, match=r"no answer from Ray's job server within 0.05 s"):
        asyncio.run(job_server("http://127.0.0.1:9", 0.05))
