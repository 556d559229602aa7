"""A policy server in a thread of the test's own process."""

import asyncio
import threading
from collections.abc import Callable

from stereovla.serving.served_model import ServedModel
from stereovla.serving.server import PolicyServer


def policy_server(parts, name: str = "tiny", limit: int | None = None, keys=None, **options) -> PolicyServer:
    """The server of a model and its processor."""
    bound = {} if limit is None else {"limit": limit}
    return PolicyServer(ServedModel(*parts, name, keys=keys, **bound), **bound, **options)


def serve_in_thread(server: PolicyServer, port: int = 0) -> tuple[str, Callable[[], None]]:
    """(url, stop function) of a server that runs in a thread of its own; port 0 takes a free one."""
    started, stopped, loop = threading.Event(), None, None
    address = []

    async def run():
        nonlocal stopped, loop
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        listening = await server.start(port=port)
        address.append(listening.sockets[0].getsockname())
        started.set()
        await stopped.wait()
        await server.stop(listening)

    # asyncio.run also ends what a client left open: a task that is collected unfinished logs from wherever that is.
    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(10)

    def stop():
        loop.call_soon_threadsafe(stopped.set)
        thread.join(30)

    return f"ws://{address[0][0]}:{address[0][1]}", stop
