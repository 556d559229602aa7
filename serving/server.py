"""Serves a policy to many clients; requests that wait at the same time may share a batch."""

import asyncio
import difflib
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from websockets.asyncio.server import Server, ServerConnection, serve

from stereovla.serving import protocol

REQUEST = ("type", "left", "right", "instruction", "state", "embodiment")
OPTIONAL = ("seed",)


class PolicyServer:
    """A model and its processor, loaded through the Auto classes, behind `protocol`.

    Args:
        name: what answers call the model, such as its Hub id.
        max_batch: requests answered together; 1 = one at a time.
        batch_wait_s: how long the first request of a batch waits for others; not waited with max_batch 1.
        limit: largest message accepted, bytes.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        max_batch: int = 1,
        batch_wait_s: float = 0.005,
        limit: int = protocol.DEFAULT_LIMIT,
    ):
        if max_batch < 1 or limit < 1:
            raise ValueError(f"max_batch is {max_batch} and limit {limit}; both must be at least 1")
        self.model, self.processor, self.name = model.eval(), processor, name
        self.max_batch, self.batch_wait_s, self.limit = max_batch, batch_wait_s, limit
        self._fresh = np.random.default_rng()

    # ------------------------------------------------------------------ policy

    def predict(self, requests: Sequence[dict[str, Any]]) -> list[np.ndarray | Exception]:
        """One chunk (chunk, action_dim) in robot units per request, or what is wrong with it.

        One bad request of a batch does not spoil the others: they are then answered one by one.
        """
        try:
            inputs = self.processor(
                images=[[request["left"], request["right"]] for request in requests],
                text=[request["instruction"] for request in requests],
                state=[request["state"] for request in requests],
                embodiment=[request["embodiment"] for request in requests],
            ).to(self.model.device)
        except (ValueError, TypeError) as error:
            return [error] if len(requests) == 1 else [self.predict([request])[0] for request in requests]
        shape = (self.model.config.chunk_size, self.model.config.action_dim)
        generators = [self._fresh if (seed := r.get("seed")) is None else np.random.default_rng(seed) for r in requests]
        noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        chunks = self.model.predict_action(**inputs, noise=torch.from_numpy(noise).to(self.model.device))
        return list(self.processor.decode_actions(chunks, [request["embodiment"] for request in requests]))

    # ------------------------------------------------------------------ connections

    def hello(self) -> dict[str, Any]:
        """The greeting."""
        return {
            "type": "hello",
            "protocol": protocol.VERSION,
            "model": self.name,
            "embodiments": list(self.processor.norm_stats or {}),
            "chunk_size": self.model.config.chunk_size,
            "state_history": self.model.config.state_history,
            "max_message_bytes": self.limit,
        }

    async def start(self, host: str = "127.0.0.1", port: int = 8765) -> Server:
        """Begins to listen. Port 0 takes a free one. Browsers are refused: any web page could reach a local port."""
        self._queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future]] = asyncio.Queue()
        self._batches = asyncio.create_task(self._answer_batches())
        return await serve(self._talk, host, port, max_size=self.limit, compression=None, origins=[None])

    async def stop(self, server: Server) -> None:
        """Closes what `start` opened."""
        server.close()
        await server.wait_closed()
        self._batches.cancel()

    async def _talk(self, connection: ServerConnection) -> None:
        await connection.send(protocol.pack(self.hello()))
        async for data in connection:
            await connection.send(protocol.pack(await self._answer(data)))

    async def _answer(self, data: bytes | str) -> dict[str, Any]:
        begin = time.perf_counter()
        try:
            request = check_request(protocol.unpack(data))
        except protocol.ProtocolError as error:
            return {"type": "error", "kind": "malformed", "message": str(error)}
        future = asyncio.get_running_loop().create_future()
        await self._queue.put((request, future))
        result = await future
        if isinstance(result, (ValueError, TypeError)):
            return {"type": "error", "kind": "invalid_input", "message": str(result)}
        if isinstance(result, Exception):
            return {"type": "error", "kind": "internal", "message": f"{type(result).__name__}: {result}"}
        latency = time.perf_counter() - begin
        return {"type": "prediction", "actions": result, "latency_s": latency, "model": self.name}

    async def _answer_batches(self) -> None:
        while True:
            batch = [await self._queue.get()]
            if self.max_batch > 1:
                await asyncio.sleep(self.batch_wait_s)
            while len(batch) < self.max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                results = await asyncio.to_thread(self.predict, [request for request, _ in batch])
            except Exception as error:  # the server goes on, whatever a model does
                traceback.print_exc()
                results = [RuntimeError(f"{type(error).__name__}: {error}")] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():  # its client may have gone
                    future.set_result(result)


def check_request(message: dict[str, Any]) -> dict[str, Any]:
    """The message, if it is a request with the keys that it needs and no others; ProtocolError otherwise."""
    if message.get("type") != "predict":
        raise protocol.ProtocolError(f"type is {message.get('type')!r}; the only request is 'predict'")
    missing = [key for key in REQUEST if key not in message]
    if missing:
        raise protocol.ProtocolError(f"the request lacks {', '.join(missing)}")
    for key in message:
        if key not in REQUEST + OPTIONAL:
            near = difflib.get_close_matches(str(key), REQUEST + OPTIONAL, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(REQUEST + OPTIONAL)}"
            raise protocol.ProtocolError(f"unknown key {key!r}; {hint}")
    seed = message.get("seed")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise protocol.ProtocolError(f"seed is {seed!r}; it must be an integer of at least 0, or absent")
    return message
