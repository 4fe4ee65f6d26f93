"""The server of the page."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.support.run_folders import write_run_folder
from treepo.errors import ConfigError
from treepo.view.bundle import live_page
from treepo.view.parts import open_parts
from treepo.view.server import serving
from treepo.view.sources import find_sources


def with_server(run: Path, use: Callable[[aiohttp.ClientSession, str], Awaitable[None]]) -> None:
    """Serve the run and let `use` ask the address."""
    sources = find_sources([run])
    parts = open_parts(sources)

    async def ask() -> None:
        async with (
            serving(live_page(sources, parts), parts) as address,
            aiohttp.ClientSession() as client,
        ):
            await use(client, address)

    asyncio.run(ask())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path / "run")


def test_the_page_and_its_answers_are_served(run: Path) -> None:
    async def use(client: aiohttp.ClientSession, address: str) -> None:
        async with client.get(address) as page:
            assert page.content_type == "text/html"
            assert page.headers["Cache-Control"] == "no-store"
            assert page.headers["Referrer-Policy"] == "no-referrer"
        async with client.get(f"{address}api/run/metrics?source=0") as answer:
            assert (await answer.json())["steps"] == [1, 2]

    with_server(run, use)


def test_an_error_is_an_answer_that_names_the_place(run: Path) -> None:
    (run / "summary.json").write_text("{")

    async def use(client: aiohttp.ClientSession, address: str) -> None:
        async with client.get(f"{address}api/run/result?source=0") as answer:
            assert answer.status == 400
            assert "summary.json" in json.loads(await answer.text())["error"]

    with_server(run, use)


def test_nothing_is_served_without_the_secret(run: Path) -> None:
    async def use(client: aiohttp.ClientSession, address: str) -> None:
        root, secret = address.rstrip("/").rsplit("/", 1)
        assert len(secret) >= 22  # 16 random bytes
        for path in ("", "api/run/state?source=0", f"{secret[:-1]}/", f"{secret}x/"):
            async with client.get(f"{root}/{path}") as answer:
                assert answer.status == 404

    with_server(run, use)


def test_only_loopback_is_listened_on(run: Path) -> None:
    async def use(_: aiohttp.ClientSession, address: str) -> None:
        assert address.startswith("http://127.0.0.1:")

    with_server(run, use)


def test_a_taken_port_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        async def serve() -> None:
            async with serving("", [], taken.getsockname()[1]):
                pass

        with pytest.raises(ConfigError, match="--port"):
            asyncio.run(serve())
