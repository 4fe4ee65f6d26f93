"""The server of `treepo view`: the page, and its questions, on loopback.

Every address begins with a secret, so that neither other users of the machine nor other pages of the browser
can read the runs.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Handler

from treepo.data.daemon_thread import in_thread
from treepo.errors import ConfigError, TreepoError
from treepo.view.part import Part, Query, json_text

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page has the rest of its policy in it
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_LOOPBACK = "127.0.0.1"
_MOST_ANSWERS = 4  # that are worked out at once


@asynccontextmanager
async def serving(page: str, parts: Sequence[Part], port: int = 0) -> AsyncIterator[str]:
    """Serve the page while the body runs, which gets its address. port: 0 for one that is free.

    Raises ConfigError if the port is taken.
    """
    secret = secrets.token_urlsafe(16)
    runner = web.AppRunner(application(page, parts, secret), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, _LOOPBACK, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; name another, or none") from None
        _, taken, *_ = runner.addresses[0]
        yield f"http://{_LOOPBACK}:{taken}/{secret}/"
    finally:
        await runner.cleanup()


def application(page: str, parts: Sequence[Part], secret: str) -> web.Application:
    """The page at `/SECRET/`, the answers at `/SECRET/api/PART/QUESTION?KEY=VALUE`.

    An error that names a file or a value is an answer with status 400 and the key `error`.
    """
    app = web.Application(middlewares=[_with_headers])
    free = asyncio.Semaphore(_MOST_ANSWERS)

    async def show_page(_: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html")

    def answering(part: Part, question: str) -> Handler:
        async def answer(request: web.Request) -> web.Response:
            query = dict(request.query)
            async with free:
                text, status = await in_thread(lambda: _answer(part, question, query))
            return web.Response(text=text, content_type="application/json", status=status)

        return answer

    app.router.add_get(f"/{secret}/", show_page)
    for part in parts:
        for question in part.answers:
            app.router.add_get(f"/{secret}/api/{part.name}/{question}", answering(part, question))
    return app


def _answer(part: Part, question: str, query: Query) -> tuple[str, int]:
    try:
        return json_text(part.answers[question](query)), 200
    except (TreepoError, OSError) as error:
        return json_text({"error": str(error)}), 400


@web.middleware
async def _with_headers(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    response.headers.update(_HEADERS)
    return response
