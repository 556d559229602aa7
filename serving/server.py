"""Serves a policy to many clients; requests that wait at the same time may share a batch."""

import asyncio
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from websockets.asyncio.server import Server, serve
from websockets.exceptions import ConnectionClosed

from stereovla.serving import protocol
from stereovla.serving.connections import CLOSING_S, BoundedConnection, Budget
from stereovla.serving.request_keys import RequestKeys

MAX_CONNECTIONS = 64
HELD_MESSAGES = 8  # largest messages that all connections may hold together
MAX_ERROR_CHARACTERS = 2000


class InternalError(RuntimeError):
    """The server's own fault."""


class PolicyServer:
    """A model and its processor, loaded through the Auto classes, behind `protocol`.

    Args:
        name: what answers call the model, such as its Hub id.
        max_batch: requests answered together; 1 = one at a time.
        batch_wait_s: how long the first request of a batch waits for others; not waited with max_batch 1.
        limit: largest message accepted, bytes. All connections together hold `HELD_MESSAGES` times as much.
        max_connections: open at a time; one more is closed, told why.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        max_batch: int = 1,
        batch_wait_s: float = 0.005,
        limit: int = protocol.DEFAULT_LIMIT,
        max_connections: int = MAX_CONNECTIONS,
    ):
        if max_batch < 1 or limit < 1:
            raise ValueError(f"max_batch is {max_batch} and limit {limit}; both must be at least 1")
        self.model, self.processor, self.name = model.eval(), processor, name
        self.keys = RequestKeys.of(model.config, processor)
        self.max_batch, self.batch_wait_s, self.limit = max_batch, batch_wait_s, limit
        self.budget = Budget(max_connections, HELD_MESSAGES * limit)
        self._fresh = np.random.default_rng()
        self._closing = False

    # ------------------------------------------------------------------ policy

    def predict(self, requests: Sequence[dict[str, Any]]) -> list[np.ndarray | Exception]:
        """One chunk (chunk, action_dim) in robot units per request, or what is wrong with it: `InternalError`, or the
        processor's ValueError or TypeError.

        What one request of a batch does is its own: where they cannot be answered together, each is alone.
        """
        try:
            return self._predict(requests)
        except Exception as error:  # the server goes on, whatever a model does
            if len(requests) > 1:
                return [self.predict([request])[0] for request in requests]
            if isinstance(error, InternalError) and error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            return [error]

    def prepare(self, requests: Sequence[dict[str, Any]]) -> Any:
        """The model's inputs; ValueError or TypeError for what cannot be used."""
        try:
            return self.processor(
                images=[self.keys.images(request) for request in requests],
                **({"depth_map": [self.keys.depths(request) for request in requests]} if self.keys.depth else {}),
                text=[request["instruction"] for request in requests],
                state=[request["state"] for request in requests],
                embodiment=[request["embodiment"] for request in requests],
            )
        except (ValueError, TypeError):
            raise
        except Exception as error:
            raise InternalError(f"{type(error).__name__}: {error}") from error

    def _predict(self, requests: Sequence[dict[str, Any]]) -> list[np.ndarray | Exception]:
        inputs, names = self.prepare(requests), [request["embodiment"] for request in requests]
        try:
            shape = (self.model.config.chunk_size, self.model.config.action_dim)
            seeds = [request.get("seed") for request in requests]
            generators = [self._fresh if seed is None else np.random.default_rng(seed) for seed in seeds]
            noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
            noise = torch.from_numpy(noise).to(self.model.device)
            chunks = self.model.predict_action(**inputs.to(self.model.device), noise=noise)
            finite = chunks.isfinite().all(dim=-1).all(dim=-1).tolist()
            good = [row for row, fine in enumerate(finite) if fine]
            decoded = self.processor.decode_actions(chunks[good], [names[row] for row in good]) if good else []
        except Exception as error:
            raise InternalError(f"{type(error).__name__}: {error}") from error
        found = dict(zip(good, decoded, strict=True))
        lost = InternalError("the model's actions are not finite for these inputs")
        return [found.get(row, lost) for row in range(len(requests))]

    # ------------------------------------------------------------------ connections

    def hello(self) -> dict[str, Any]:
        """The greeting."""
        return {
            "type": "hello",
            "protocol": protocol.VERSION,
            "model": self.name,
            "views": list(self.keys.views),
            "reads_depth": self.keys.depth,
            "embodiments": list(self.processor.norm_stats or {}),
            "chunk_size": self.model.config.chunk_size,
            "state_history": self.model.config.state_history,
            "max_message_bytes": self.limit,
        }

    async def start(self, host: str = "127.0.0.1", port: int = 8765) -> Server:
        """Begins to listen. Port 0 takes a free one. Browsers are refused: any web page could reach a local port."""
        self._queue: asyncio.Queue[tuple[dict[str, Any], asyncio.Future]] = asyncio.Queue()
        self._batches = asyncio.create_task(self._answer_batches())
        self._in_flight, self._idle = 0, asyncio.Event()
        self._idle.set()
        return await serve(
            self._talk,
            host,
            port,
            max_size=self.limit,
            compression=None,
            origins=[None],
            create_connection=self.budget.connection,
            close_timeout=CLOSING_S,
        )

    async def stop(self, server: Server, reason: str = "the server is shutting down") -> None:
        """Takes no more connections and requests, answers those in flight, and closes with the reason."""
        self._closing = True
        server.close(close_connections=False)
        await self._idle.wait()
        await asyncio.gather(*(connection.close(1001, reason) for connection in server.connections))
        await server.wait_closed()
        self._batches.cancel()

    async def _talk(self, connection: BoundedConnection) -> None:
        if len(self.budget.admitted) >= self.budget.max_connections:
            await connection.close(1013, f"{self.budget.max_connections} connections are open; try again later")
            return
        self.budget.admitted.add(connection)
        gone = asyncio.create_task(connection.wait_closed())
        try:
            await connection.send(protocol.pack(self.hello()))
            async for data in connection:
                connection.take()
                self._in_flight += 1
                self._idle.clear()
                try:
                    answer = await self._answer(data, gone)
                    del data
                    if answer is not None:
                        await connection.send(protocol.pack(answer))
                finally:
                    connection.taken = 0
                    self._in_flight -= 1
                    if not self._in_flight:
                        self._idle.set()
        except ConnectionClosed:
            pass  # the client has gone, or was sent away
        finally:
            gone.cancel()

    async def _answer(self, data: bytes | str, gone: asyncio.Task) -> dict[str, Any] | None:
        """The answer; None where the client has `gone` before its request was begun."""
        begin = time.perf_counter()
        if self._closing:
            return _error("closing", "the server is shutting down and takes no more requests")
        try:
            request = await asyncio.to_thread(lambda: self.keys.check(protocol.unpack(data)))
        except protocol.ProtocolError as error:
            return _error("malformed", error)
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, future))  # a connection has one request at a time: never more than these
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            future.cancel()
            return None
        result = future.result()
        if isinstance(result, InternalError):
            return _error("internal", result)
        if isinstance(result, Exception):
            return _error("invalid_input", result)
        latency = time.perf_counter() - begin
        return {"type": "prediction", "actions": result, "latency_s": latency, "model": self.name}

    async def _answer_batches(self) -> None:
        while True:
            batch = [await self._queue.get()]
            if self.max_batch > 1:
                await asyncio.sleep(self.batch_wait_s)
            while len(batch) < self.max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(request, future) for request, future in batch if not future.done()]  # those whose client is there
            if not batch:
                continue
            try:
                results = await asyncio.to_thread(self.predict, [request for request, _ in batch])
            except Exception as error:  # the server goes on
                traceback.print_exc()
                results = [InternalError(f"{type(error).__name__}: {error}")] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
            del batch, results  # not held while nobody asks


def _error(kind: str, message: Any) -> dict[str, Any]:
    text = str(message)
    if len(text) > MAX_ERROR_CHARACTERS:
        text = f"{text[:MAX_ERROR_CHARACTERS]} ... ({len(text):,} characters)"
    return {"type": "error", "kind": kind, "message": text}
