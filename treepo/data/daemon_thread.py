"""Calls of functions that may block for ever, as on a disk or a server that does not answer."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


async def in_thread[T](function: Callable[[], T]) -> T:
    """Call the function in a thread of its own, which does not keep the process from ending if it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: object) -> None:
        if not future.done():
            setter(value)

    def call() -> None:
        try:
            setter, value = future.set_result, function()
        except BaseException as error:
            setter, value = future.set_exception, error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, setter, value)

    threading.Thread(target=call, daemon=True).start()
    return await future
