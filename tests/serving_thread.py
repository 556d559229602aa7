"""A policy server in a thread of the test's own process."""

import asyncio
import threading
from collections.abc import Callable

from stereovla.serving.server import PolicyServer


def serve_in_thread(server: PolicyServer) -> tuple[str, Callable[[], None]]:
    """(url, stop function) of a server that runs in a thread of its own."""
    started, stopped = threading.Event(), None
    address = []

    async def run():
        nonlocal stopped
        stopped = asyncio.Event()
        listening = await server.start(port=0)
        address.append(listening.sockets[0].getsockname())
        started.set()
        await stopped.wait()
        await server.stop(listening)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(10)

    def stop():
        loop.call_soon_threadsafe(stopped.set)
        thread.join(10)

    return f"ws://{address[0][0]}:{address[0][1]}", stop
