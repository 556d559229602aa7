"""Serves a policy over WebSocket.

python -m serving --model CHECKPOINT --port 8765
"""

import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModel, AutoProcessor, HfArgumentParser

from serving.server import PolicyServer

NEEDED = ("config.json", "processor_config.json", "tokenizer.json")


@dataclass
class ServingOptions:
    """What `python -m serving` can be told."""

    model: str = field(metadata={"help": "Checkpoint, folder or Hub id; its remote code is run."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; there is no password."})
    port: int = field(default=8765, metadata={"help": "Port to listen on; 0 takes a free one."})
    max_batch: int = field(default=1, metadata={"help": "Requests answered together; 1 = one at a time."})
    max_message_mb: int = field(default=32, metadata={"help": "Largest message accepted, MiB."})
    device: str = field(default="cpu", metadata={"help": "Where the model runs: cpu, cuda, cuda:1, ..."})


def load(source: str, device: str) -> tuple[AutoModel, AutoProcessor]:
    """Model and processor; FileNotFoundError names what a folder lacks."""
    folder = Path(source)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if folder.is_dir() and missing:
        raise FileNotFoundError(f"{source!r} is no checkpoint: it lacks {', '.join(missing)}")
    model = AutoModel.from_pretrained(source, trust_remote_code=True).to(device)
    return model, AutoProcessor.from_pretrained(source, trust_remote_code=True)


async def run(options: ServingOptions) -> None:
    """Listens until it is interrupted."""
    name = Path(options.model).resolve().name if Path(options.model).is_dir() else options.model
    policy = PolicyServer(
        *load(options.model, options.device), name, options.max_batch, limit=options.max_message_mb * 2**20
    )
    server = await policy.start(options.host, options.port)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: {options.host} may be reached by other machines, and anyone who reaches it may use the policy")
    for socket in server.sockets:
        print(f"serving {name} on ws://{socket.getsockname()[0]}:{socket.getsockname()[1]}", flush=True)
    try:
        await server.wait_closed()
    finally:
        await policy.stop(server)


def main() -> int:
    """Runs the server; returns the exit status."""
    (options,) = HfArgumentParser(ServingOptions, description=__doc__).parse_args_into_dataclasses()
    try:
        asyncio.run(run(options))
    except OSError as error:  # no such checkpoint, or the port is taken
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
