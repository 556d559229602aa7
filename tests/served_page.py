"""A page of `stereovla app` in a thread of the test's own process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stereovla.app.command import AppOptions, listening, make_page, server_of


@contextmanager
def served_page(options: AppOptions) -> Iterator[str]:
    """Its address, at a free port."""
    taken = listening(options.host, 0)
    page, blocks = make_page(options)
    server = server_of(blocks)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has ended"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        page.close()
        taken.close()
