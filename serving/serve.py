"""Serves a policy over a WebSocket."""

import asyncio
import signal
from dataclasses import dataclass
from pathlib import Path

from stereovla.command_line import option
from stereovla.serving.server import PolicyServer
from stereovla.sources import load_checkpoint

ENDING = (signal.SIGTERM, signal.SIGINT)


@dataclass
class ServingOptions:
    """Answers robots over a WebSocket, on this machine unless told otherwise.

    stereovla serve --model CHECKPOINT --port 8765
    """

    model: str = option("", "Model or adapter, folder or Hub id; its remote code is run.")
    host: str = option("127.0.0.1", "Address to listen on; there is no password.")
    port: int = option(8765, "Port to listen on; 0 takes a free one.")
    max_batch: int = option(1, "Requests answered together; 1 = one at a time.")
    max_message_mb: int = option(32, "Largest message accepted, MiB.")
    max_connections: int = option(64, "Connections open at a time.")
    run_code: bool = option(
        False,
        "Run the code of a model on the Hub that an adapter names, also where it is not that of this installation.",
    )
    device: str = option("cpu", "Where the model runs: cpu, cuda, cuda:1, ...")

    def __post_init__(self):
        if not self.model:
            raise ValueError("--model is missing: folder or Hub id of a model or an adapter")


async def run(options: ServingOptions) -> None:
    """Listens until SIGTERM or SIGINT (Ctrl-C); then requests in flight are answered, and all connections are closed
    with the reason. A second signal ends it at once.
    """
    name = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model
    policy = PolicyServer(
        *load_checkpoint(options.model, options.device, options.run_code),
        name,
        options.max_batch,
        limit=options.max_message_mb * 2**20,
        max_connections=options.max_connections,
    )
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def end(number: int) -> None:
        print(f"{signal.Signals(number).name}: answering what was asked, taking nothing more", flush=True)
        for other in ENDING:
            loop.remove_signal_handler(other)
        ended.set()

    for number in ENDING:
        loop.add_signal_handler(number, end, number)
    server = await policy.start(options.host, options.port)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: {options.host} may be reached by other machines, and anyone who reaches it may use the policy")
    for socket in server.sockets:
        print(f"serving {name} on ws://{socket.getsockname()[0]}:{socket.getsockname()[1]}", flush=True)
    await ended.wait()
    await policy.stop(server)


def serve(options: ServingOptions) -> None:
    """Serves until it is interrupted."""
    try:
        asyncio.run(run(options))
    except KeyboardInterrupt:
        pass  # the second Ctrl-C
