"""Grading by an endpoint: a real HTTP server in the test does what each response tells it to."""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from treepo.config.reward import RewardConfig
from treepo.errors import ConfigError
from treepo.rewards import endpoint
from treepo.rewards.grade import Grade, GradeItem
from treepo.rewards.pool import open_rewards
from treepo.tree import Verdict

Handler = Callable[[list[dict[str, Any]]], Awaitable[web.Response | None]]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT_SECONDS", 0.01)


def grade(handler: Handler, items: Sequence[GradeItem], **settings: object) -> list[Grade]:
    """Grade `items` by a server that answers non-empty batches by `handler`; None hangs up."""

    async def answer(request: web.Request) -> web.Response:
        secret = os.environ.get("TREEPO_REWARD_AUTHORIZATION", "").strip()
        assert request.headers.get("Authorization", "") == secret
        received = (await request.json())["items"]
        reply = await handler(received) if received else web.json_response({"grades": []})
        if reply is None:
            assert request.transport is not None
            request.transport.abort()
            reply = web.Response()
        return reply

    async def run() -> list[Grade]:
        app = web.Application()
        app.router.add_post("/grade", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/grade"
            config = RewardConfig.model_validate({"url": url, "deadline_seconds": 30.0} | settings)
            async with open_rewards(config) as rewards:
                return await rewards.grade(items)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def items_of(*responses: str) -> list[GradeItem]:
    return [GradeItem(response, "1") for response in responses]


@pytest.mark.parametrize("value", ["Bearer secret", "Bearer secret\n", "\r\n"])
def test_it_is_let_in_by_a_header_that_is_in_no_file(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that Kubernetes mounts may end with a line break."""
    monkeypatch.setenv("TREEPO_REWARD_AUTHORIZATION", value)
    assert [grade.reward for grade in grade(by_number, items_of("1"))] == [1.0]


@pytest.mark.parametrize("value", ["Bearer secret\nX: 1", "Bearer\x7fsecret", "secret\udcff"])
def test_a_header_that_cannot_be_sent_is_one_line_that_does_not_show_it(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREEPO_REWARD_AUTHORIZATION", value)
    with pytest.raises(ConfigError, match="TREEPO_REWARD_AUTHORIZATION contains a line break") as raised:
        grade(by_number, items_of("1"))
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


async def by_number(received: list[dict[str, Any]]) -> web.Response:
    return web.json_response({"grades": [float(item["response"]) for item in received]})


def test_the_endpoint_sees_everything_and_its_numbers_come_back() -> None:
    seen: list[dict[str, Any]] = []

    async def handler(received: list[dict[str, Any]]) -> web.Response:
        seen.extend(received)
        grades = [{"reward": 0.5, "correct": False, "style": 3}, 1, {"reward": 0, "correct": True}, -0.25]
        return web.json_response({"grades": grades})

    hard = "½ \0 \ud800 \U0001f9ee \\boxed{1}"
    items = [GradeItem(hard, "42", "what?", {"level": [1, None]}), *items_of("b", "c", "d")]
    result = grade(handler, items)
    assert seen[0] == {"prompt": "what?", "response": hard, "answer": "42", "extra": {"level": [1, None]}}
    assert [item["response"] for item in seen] == [hard, "b", "c", "d"]
    assert result == [
        Grade(0.5, Verdict.WRONG, terms={"style": 3.0}),
        Grade(1.0, Verdict.CORRECT),
        Grade(0.0, Verdict.CORRECT),
        Grade(-0.25, Verdict.WRONG),
    ]


def test_batches_are_bounded_and_the_order_is_kept_whichever_ends_first() -> None:
    sizes: list[int] = []
    at_once = [0, 0]  # now, most
    turn = asyncio.Condition()
    later: list[int] = []

    async def handler(received: list[dict[str, Any]]) -> web.Response:
        sizes.append(len(received))
        at_once[0] += 1
        at_once[1] = max(at_once)
        number = int(received[0]["response"])
        async with turn:  # the first batch of each pair is answered after the second
            if number % 6 == 0 and number < 18:
                await turn.wait_for(lambda: number in later)
            else:
                later.append(number - 3)
                turn.notify_all()
        at_once[0] -= 1
        return await by_number(received)

    result = grade(handler, items_of(*map(str, range(20))), batch_size=3, workers=2)
    assert [one.reward for one in result] == list(range(20))
    assert sorted(sizes) == [2, 3, 3, 3, 3, 3, 3]
    assert at_once[1] == 2


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_passing_fault_is_tried_again(status: int) -> None:
    requests: list[int] = []

    async def handler(received: list[dict[str, Any]]) -> web.Response:
        requests.append(len(received))
        return web.Response(status=status) if len(requests) < 3 else await by_number(received)

    assert grade(handler, items_of("1"), attempts=3) == [Grade(1.0, Verdict.CORRECT)]
    assert len(requests) == 3


def test_a_connection_that_breaks_is_tried_again() -> None:
    requests: list[int] = []

    async def handler(received: list[dict[str, Any]]) -> web.Response | None:
        requests.append(len(received))
        return None if len(requests) == 1 else await by_number(received)

    assert grade(handler, items_of("1")) == [Grade(1.0, Verdict.CORRECT)]


def replying(body: str, status: int = 200) -> Handler:
    async def handler(received: list[dict[str, Any]]) -> web.Response:  # noqa: ARG001 - the same to all
        return web.Response(text=body, status=status)

    return handler


@pytest.mark.parametrize(
    ("body", "status", "said", "requests"),
    [
        ("out of\nmemory", 500, "HTTP 500: out of memory", 2),
        ("no such route", 404, "HTTP 404: no such route", 1),
        ('{"grades": [1]}', 200, "it returned 1 grades for 2 responses", 1),
        ('{"grades": {"0": 1}}', 200, 'its reply is no object with a list "grades"', 1),
        ("[1, 2]", 200, 'its reply is no object with a list "grades"', 1),
        ("<html>", 200, "its reply is not JSON: Expecting value: line 1 column 1 (char 0)", 1),
        ("[" * 100_000, 200, "its reply is not JSON", 1),
    ],
)
def test_a_bad_reply_is_an_error_of_its_whole_batch_said_once(
    body: str, status: int, said: str, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    async def handler(received: list[dict[str, Any]]) -> web.Response:
        asked.append(len(received))
        return web.Response(text=body, status=status)

    with caplog.at_level(logging.ERROR):
        result = grade(handler, items_of("1", "2", "3", "4"), batch_size=2, workers=1, attempts=2)
    assert len(asked) == 2 * requests
    assert [(one.reward, one.verdict) for one in result] == [(None, Verdict.ERROR)] * 4
    assert all(one.message is not None and one.message.startswith(said) for one in result)
    [record] = [record.getMessage() for record in caplog.records]
    assert said in record
    assert "\n" not in record


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("NaN", "it returned reward = nan, which is not finite"),
        ("1e999", "it returned reward = inf, which is not finite"),
        ("1" + "0" * 400, "which is no number"),
        ("null", "it returned null, no grade, for a response"),
        ('"good"', "it returned reward = 'good', which is text"),
        ('"1.0"', "it returned reward = '1.0', which is text; allowed: a number"),
        ('{"reward": null}', "it returned reward = None; allowed: a number"),
        ('{"reward": 1, "correct": 0.5}', "it returned correct = 0.5; allowed: true, false, 1, 0"),
        ('{"reward": 1, "correct": "yes"}', "it returned correct = 'yes', which is text"),
        (
            '{"reward": 1, "parts": [1]}',
            "it returned parts = [1], which is no number; allowed: a number, a text",
        ),
        ("[1]", "it returned reward = [1], which is no number"),
        ('{"score": 1}', "it returned a dict without \"reward\", only ['score']"),
        ('{"reward": 1, "style": -Infinity}', "it returned style = -inf, which is not finite"),
    ],
)
def test_a_grade_that_is_none_is_an_error_of_its_response_alone(value: str, said: str) -> None:
    before, bad, after = grade(replying(f'{{"grades": [0.25, {value}, 0.75]}}'), items_of("1", "2", "3"))
    assert (before.reward, after.reward) == (0.25, 0.75)
    assert (bad.reward, bad.verdict) == (None, Verdict.ERROR)
    assert said in (bad.message or "")


def test_no_reply_in_time_is_a_timeout_and_disturbs_no_other_batch() -> None:
    async def handler(received: list[dict[str, Any]]) -> web.Response:
        if received[0]["response"] == "hang":
            await asyncio.Event().wait()
        return await by_number(received)

    items = items_of("1", "hang", "3")
    result = grade(handler, items, batch_size=1, attempts=2, deadline_seconds=1)
    late = Grade(None, Verdict.TIMEOUT, message="no reply within 1 s")
    assert result == [Grade(1.0, Verdict.CORRECT), late, Grade(3.0, Verdict.CORRECT)]


def grade_raw(reply: bytes, *, drip: float = 0.0, **settings: object) -> list[Grade]:
    """Grade one item by a server that writes `reply`, or one byte of it every `drip` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await reader.readuntil(b"\r\n\r\n")
        length = int(received.lower().partition(b"content-length: ")[2].split()[0])
        empty = await reader.readexactly(length) == b'{"items": []}'
        with contextlib.suppress(ConnectionError):
            if empty:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n" + b'{"grades": []}')
                await writer.drain()
            elif not drip:
                writer.write(reply)
                await writer.drain()
            else:
                for byte in reply:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(drip)
            writer.close()

    async def run() -> list[Grade]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            config = RewardConfig.model_validate({"url": url, "deadline_seconds": 30.0} | settings)
            async with open_rewards(config) as rewards:
                return await rewards.grade(items_of("1"))

    return asyncio.run(run())


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (OK + b'Content-Length: 99\r\n\r\n{"grades": [1]}', "no reply: "),
        (OK + b'Transfer-Encoding: chunked\r\n\r\n8\r\n{"grades', "no reply: "),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}", "no reply: "),
        (b"\0\1\2garbage\r\n\r\n", "no reply: "),
        (b"", "no reply: "),
        (OK + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n", "no reply: "),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd", "no reply: "),
        (OK + b"Content-Length: 3\r\n\r\n\xff\xfe\x00", "its reply is not JSON"),
        (OK + b"Content-Length: 99999999\r\n\r\n" + b" " * 99_999_999, "its reply is longer than 16 MiB"),
    ],
)
def test_a_broken_reply_is_an_error_in_one_line(reply: bytes, said: str) -> None:
    (bad,) = grade_raw(reply, attempts=2)
    assert (bad.reward, bad.verdict) == (None, Verdict.ERROR)
    assert bad.message is not None
    assert bad.message.startswith(said)
    assert "\n" not in bad.message
    assert len(bad.message) < 400


def test_an_endless_reply_ends_at_the_bound() -> None:
    piece = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    (bad,) = grade_raw(OK + b"Transfer-Encoding: chunked\r\n\r\n" + 300 * piece, attempts=1)
    assert bad.message == "its reply is longer than 16 MiB"


def test_a_reply_that_drips_ends_at_the_deadline() -> None:
    (bad,) = grade_raw(
        OK + b"Content-Length: 99999\r\n\r\n" + b" " * 99_999, drip=0.05, attempts=1, deadline_seconds=1
    )
    assert (bad.verdict, bad.message) == (Verdict.TIMEOUT, "no reply within 1 s")


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "http://127.0.0.1:1/elsewhere", "/grade", "ftp://x"]
)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(target: str, status: int) -> None:
    """It could send answers, and a password in the URL, to another host."""
    asked: list[int] = []

    async def handler(received: list[dict[str, Any]]) -> web.Response:
        asked.append(len(received))
        return web.Response(status=status, headers={"Location": target})

    (bad,) = grade(handler, items_of("1"))
    assert bad.message == f"HTTP {status}: it redirects to {target}, which is not followed"
    assert asked == [1]


def test_a_password_in_the_address_is_refused() -> None:
    """It would be in config.yaml; the Authorization header has a variable of its own."""
    with pytest.raises(ValidationError, match="url"):
        RewardConfig(url="http://me:secret@127.0.0.1:1/")


def test_waiting_for_a_slot_does_not_count_against_the_deadline() -> None:
    async def handler(received: list[dict[str, Any]]) -> web.Response:
        await asyncio.sleep(0.25)
        return await by_number(received)

    # One at a time they take two seconds, which is beyond the deadline of each.
    result = grade(handler, items_of(*"1" * 8), batch_size=1, workers=1, attempts=1, deadline_seconds=1.6)
    assert [one.reward for one in result] == [1.0] * 8


def test_an_endpoint_that_does_not_answer_ends_the_run_before_it_starts() -> None:
    async def start(url: str) -> None:
        async with open_rewards(RewardConfig(url=url, attempts=2)):
            pass

    with pytest.raises(ConfigError, match=r"reward.url = http://127.0.0.1:1/: no reply: Cannot connect"):
        asyncio.run(start("http://127.0.0.1:1/"))  # a port that is reserved, and nobody's


@pytest.mark.parametrize("value", [b"bytes", float("nan"), object()])
def test_what_json_cannot_hold_is_named_by_its_column(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"data.columns.extra holds what JSON cannot: .*reward.url needs it"
    ):
        grade(by_number, [GradeItem("1", "1", extra={"x": value})])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "http://x", "function": "a:b"}, "function = a:b and url = http://x are two ways to grade"),
        ({"url": "http://x", "memory_mb": 512}, "memory_mb = 512, but url grades"),
        ({"url": "http://x", "wrong": 0.0}, "wrong = 0.0, but url grades, and only math-verify read"),
        ({"function": "a:b", "correct": 2.0}, "correct = 2.0, but function grades"),
        ({"batch_size": 8}, "batch_size = 8, but math-verify grades, and only url read"),
        ({"url": "ftp://x"}, "should match pattern"),
        (
            {"terms": {"overlng": 1.0}},
            "should be one of format_boxed, .*, found 'overlng'; did you mean 'overlong'",
        ),
        ({"terms": {"length": 0.0}}, "greater than 0"),
        ({"terms": {"overlong": 1.0}}, "the term `overlong` needs a number of tokens"),
        ({"overlong_buffer_tokens": 8}, r"overlong_buffer_tokens = 8 with terms = {}"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RewardConfig.model_validate(settings)


def test_the_format_is_the_documented_one() -> None:
    """The example of the module's docstring, as JSON."""
    documented = endpoint.__doc__ or ""
    reply = documented[documented.index('{"grades"') : documented.index(", ...]}\n\nOne")] + "]}"
    grades = endpoint._decode(reply.encode(), count=len(json.loads(reply)["grades"]))
    assert [one.verdict for one in grades] == [Verdict.CORRECT, Verdict.CORRECT, Verdict.ERROR]
    assert grades[1].terms == {"style": 0.2}
