"""Serves a policy on openpi's wire."""

import asyncio
import contextlib
import ipaddress
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stereovla.command_line import option
from stereovla.serving.client import API_KEY
from stereovla.serving.observation_keys import read_keys
from stereovla.serving.served_model import ServedModel
from stereovla.serving.server import PolicyServer
from stereovla.sources import DTYPES, RUN_CODE, check_checkpoint, fingerprint, load_checkpoint

ENDING = (signal.SIGTERM, signal.SIGINT)
SHORTEST_KEY = 16


@dataclass
class ModelOptions:
    """The model that answers, and where it runs: the server's and the page's."""

    model: str = option("", "Model or adapter, folder or Hub id; its remote code is run.")
    run_code: bool = option(False, RUN_CODE)
    device: str = option("cpu", "Where the model runs: cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", "Of the weights; auto = as they were saved.", choices=["auto", *DTYPES])

    def __post_init__(self):
        if not self.model:
            raise ValueError("--model is missing: folder or Hub id of a model or an adapter")


@dataclass
class ServingOptions(ModelOptions):
    """Answers robots over a WebSocket on openpi's wire, on this machine unless told otherwise.

    stereovla serve --model CHECKPOINT --port 8765

    The environment variable STEREOVLA_API_KEY is the key that clients must show; another --host than this machine
    needs one. GET /healthz answers when it is ready, GET /metrics as Prometheus reads it.
    """

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8765, "Port to listen on; 0 takes a free one.")
    keys: str = option("", "JSON file with the keys of observations, in place of the defaults of the same names.")
    embodiment: str = option("", "Robot of observations that name none; needed only where the model knows several.")
    max_batch: int = option(8, "Requests of one shape answered together; 1 = one at a time.")
    max_requests: int = option(32, "Requests that wait or are computed at a time; one more is refused.")
    deadline_s: float = option(30.0, "Longest time from a request to its answer; a later one is refused.")
    max_message_mb: int = option(32, "Largest message accepted, MiB.")
    max_connections: int = option(64, "Connections open at a time.")
    compile: bool = option(False, "Compile the prediction of actions as one graph; the warm-up takes minutes.")

    def __post_init__(self):
        super().__post_init__()
        self.api_key()

    def api_key(self) -> str:
        """The key that clients must show, "" for none; ValueError for one that is none, or where one is needed."""
        key = os.environ.get(API_KEY, "")
        if key and not (len(key) >= SHORTEST_KEY and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                f"{API_KEY} is set, but is no key: it must have at least {SHORTEST_KEY} printable ASCII characters, no "
                "space; `openssl rand -hex 32` makes one"
            )
        if not key and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host!r} may be reached by other machines: set the key that clients must show in the "
                f"environment variable {API_KEY} (`openssl rand -hex 32` makes one), or listen on 127.0.0.1"
            )
        return key


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_model(options: ModelOptions, **served: Any) -> ServedModel:
    """The model, under the name that its users see; `served`: what else `ServedModel` is told."""
    check_checkpoint(options.model)
    name = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model
    dtype = None if options.dtype == "auto" else options.dtype
    model, processor = load_checkpoint(options.model, options.device, options.run_code, dtype=dtype)
    return ServedModel(model, processor, name, fingerprint(options.model), **served)


def load(options: ServingOptions) -> ServedModel:
    """The model, ready: every size of batch that will be asked for has been answered once."""
    keys = read_keys(options.keys) if options.keys else None
    served = load_model(options, keys=keys, embodiment=options.embodiment, limit=options.max_message_mb * 2**20)
    if options.compile:
        served.model.compile_predict_action()
    served.warm_up(sorted({1, min(2, options.max_batch), options.max_batch}))
    return served


async def run(options: ServingOptions) -> None:
    """Listens until SIGTERM or SIGINT (Ctrl-C); then requests in flight are answered, and all connections are closed
    with the reason. A second signal ends it at once.
    """
    served = load(options)
    policy = PolicyServer(
        served,
        options.max_batch,
        max_requests=options.max_requests,
        deadline_s=options.deadline_s,
        limit=options.max_message_mb * 2**20,
        max_connections=options.max_connections,
        api_key=options.api_key(),
    )
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def end(number: int) -> None:
        for other in ENDING:
            loop.remove_signal_handler(other)
        ended.set()  # before anything is said: who reads it may have gone
        with contextlib.suppress(OSError):
            print(f"{signal.Signals(number).name}: answering what was asked, taking nothing more", flush=True)

    for number in ENDING:
        loop.add_signal_handler(number, end, number)
    server = await policy.start(options.host, options.port)
    for socket in server.sockets:
        host, port = socket.getsockname()[:2]
        print(f"serving {served.name} on ws://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await ended.wait()
    await policy.stop(server)


def serve(options: ServingOptions) -> None:
    """Serves until it is interrupted."""
    try:
        asyncio.run(run(options))
    except KeyboardInterrupt:
        pass  # the second Ctrl-C
