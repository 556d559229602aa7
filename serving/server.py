"""Serves a model to many clients on openpi's wire; requests of one shape that wait at the same time share a batch."""

import asyncio
import hmac
import http
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from stereovla.serving import wire
from stereovla.serving.connections import CLOSING_S, BoundedConnection, Budget
from stereovla.serving.metrics import Metrics
from stereovla.serving.observation_keys import ENDPOINT, ENDPOINTS
from stereovla.serving.served_model import InternalError, Prepared, ServedModel

MAX_CONNECTIONS = 64
MAX_REQUESTS = 32
DEADLINE_S = 30.0
HELD_MESSAGES = 8  # largest messages that all connections may hold together
MAX_ERROR_CHARACTERS = 2000
# close codes by the kind of what is refused; 1011 is what openpi's server has for all
CODES = {"busy": 1013, "closing": 1001}


class Refusal(Exception):
    """A request that is not answered. kind: "malformed" (no such message), "invalid_input" (values that cannot be
    used), "internal" (the server's fault), "busy" (too many requests), "late" (over the deadline), "closing".
    """

    def __init__(self, kind: str, message: Any):
        text = str(message)
        if len(text) > MAX_ERROR_CHARACTERS:
            text = f"{text[:MAX_ERROR_CHARACTERS]} ... ({len(text):,} characters)"
        super().__init__(f"{kind}: {text}")
        self.kind, self.code = kind, CODES.get(kind, 1011)


@dataclass
class Waiting:
    """A request that is read, and its answer to come: (values, seconds in the model) or an `InternalError`."""

    prepared: Prepared
    answer: asyncio.Future


class PolicyServer:
    """A `ServedModel` behind `wire`.

    Args:
        max_batch: requests of one shape answered together; 1 = one at a time.
        batch_wait_s: how long at most the first of a batch waits for those connections that have not asked yet.
        max_requests: waited for or computed at a time; one more is refused.
        deadline_s: longest time from a message to its answer; a later one is refused, and not begun any more.
        limit: largest message accepted, bytes. All connections together hold `HELD_MESSAGES` times as much.
        max_connections: open at a time; one more is closed, told why.
        api_key: what clients must show, "Authorization: Api-Key ..."; "" = nothing.
    """

    def __init__(
        self,
        served: ServedModel,
        max_batch: int = 1,
        batch_wait_s: float = 0.005,
        max_requests: int = MAX_REQUESTS,
        deadline_s: float = DEADLINE_S,
        limit: int = wire.DEFAULT_LIMIT,
        max_connections: int = MAX_CONNECTIONS,
        api_key: str = "",
    ):
        numbers = {"max_batch": max_batch, "max_requests": max_requests, "limit": limit}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not deadline_s > 0 or not batch_wait_s >= 0:
            raise ValueError(f"deadline_s is {deadline_s}, it must be above 0; batch_wait_s {batch_wait_s}, at least 0")
        self.served, self.max_batch, self.batch_wait_s = served, max_batch, batch_wait_s
        self.max_requests, self.deadline_s, self.limit = max_requests, deadline_s, limit
        self.budget = Budget(max_connections, HELD_MESSAGES * limit)
        self._authorization = f"Api-Key {api_key}".encode() if api_key else b""
        self._in_flight, self._closing = 0, False
        self.metrics = Metrics(
            lambda: len(self.budget.admitted), lambda: self._in_flight, lambda: float(self.budget.held)
        )

    def metadata(self) -> dict[str, Any]:
        """What a client is told on connect."""
        return {**self.served.metadata(), "max_message_bytes": self.limit}

    # ------------------------------------------------------------------ listening

    async def start(self, host: str = "127.0.0.1", port: int = 8765) -> Server:
        """Begins to listen. Port 0 takes a free one. Browsers are refused: any web page could reach a local port."""
        self._greeting = wire.pack(self.metadata())
        self._waiting: list[Waiting] = []
        self._arrived = asyncio.Event()
        # a tokenizer is not for several threads at once, nor is a model
        self._reader, self._computer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "model")
        self._batches = asyncio.create_task(self._answer_batches())
        self._idle = asyncio.Event()
        self._idle.set()
        return await serve(
            self._talk,
            host,
            port,
            max_size=self.limit,
            compression=None,
            origins=[None],
            process_request=self._process_request,
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
        self._reader.shutdown()
        self._computer.shutdown()

    def _process_request(self, connection: BoundedConnection, request: Request) -> Response | None:
        """Answers what is asked by HTTP alone, and whom the key is missing."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        shown = request.headers.get_all("Authorization")
        if self._authorization and not (len(shown) == 1 and hmac.compare_digest(_bytes(shown[0]), self._authorization)):
            text = "this server needs its key: the header 'Authorization: Api-Key KEY'\n"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
        if path != "/metrics":
            return None
        response = connection.respond(http.HTTPStatus.OK, self.metrics.page().decode())
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = self.metrics.content_type
        return response

    # ------------------------------------------------------------------ connections

    async def _talk(self, connection: BoundedConnection) -> None:
        if len(self.budget.admitted) >= self.budget.max_connections:
            await connection.close(1013, f"{self.budget.max_connections} connections are open; try again later")
            return
        self.budget.admitted.add(connection)
        gone = asyncio.create_task(connection.wait_closed())
        gone.add_done_callback(lambda _: self._arrived.set())  # one less to wait for
        noise, before = [np.random.default_rng()], 0.0  # the generator of this connection; seconds of the last answer
        try:
            await connection.send(self._greeting)
            async for data in connection:
                begin = time.perf_counter()
                refusal = None
                with self._counted(connection):
                    try:
                        answer = await self._answer(data, noise, gone)
                        del data
                        if before:
                            answer["server_timing"]["prev_total_ms"] = 1000 * before
                        await connection.send(wire.pack(answer))
                        before = time.perf_counter() - begin
                        self.metrics.latency.observe(before)
                    except Refusal as error:
                        refusal = error
                        await connection.send(str(refusal))
                    self.metrics.answers.labels("answered" if refusal is None else refusal.kind).inc()
                if refusal is not None:
                    await connection.close(refusal.code, f"{refusal.kind}: the text frame before this says why")
                    return
        except ConnectionClosed:
            pass  # the client has gone, or was sent away
        finally:
            gone.cancel()

    @contextmanager
    def _counted(self, connection: BoundedConnection) -> Iterator[None]:
        """A request is in flight within."""
        connection.take()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            connection.taken = 0
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _answer(self, data: bytes | str, noise: list[np.random.Generator], gone: asyncio.Task) -> dict[str, Any]:
        """The answer; `Refusal`, or ConnectionClosed where the client has `gone` before its request was computed."""
        if self._closing:
            raise Refusal("closing", "the server is shutting down and takes no more requests")
        if self._in_flight > self.max_requests:
            raise Refusal("busy", f"{self.max_requests} requests wait or are computed; try again later")
        loop, begin = asyncio.get_running_loop(), time.perf_counter()
        try:
            async with asyncio.timeout(self.deadline_s):
                prepared = await loop.run_in_executor(self._reader, self._read, data, noise)
                del data
                if prepared is None:
                    return {"server_timing": {"infer_ms": 0.0}}
                waiting = Waiting(prepared, loop.create_future())
                self._waiting.append(waiting)
                self._arrived.set()
                try:
                    await asyncio.wait({waiting.answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waiting.answer.cancel()  # nothing where it is done
        except TimeoutError:
            raise Refusal("late", f"no answer within {self.deadline_s:g} s; the server is too slow for it") from None
        if waiting.answer.cancelled():
            raise ConnectionClosed(None, None)
        result, seconds = waiting.answer.result()
        if isinstance(result, Exception):
            raise Refusal("internal", result)
        waited = time.perf_counter() - begin - seconds
        return {**result, "server_timing": {"infer_ms": 1000 * seconds, "wait_ms": 1000 * waited}}

    def _read(self, data: bytes | str, noise: list[np.random.Generator]) -> Prepared | None:
        """What a message asks for; None for a reset, which has been done. `Refusal` for what cannot be used."""
        try:
            message = wire.unpack_bounded(data)
        except wire.WireError as error:
            raise Refusal("malformed", error) from error
        try:
            endpoint = message.get(ENDPOINT, ENDPOINTS[0])
            if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
                raise ValueError(f"{ENDPOINT} is {wire.shown(endpoint)}; valid: {', '.join(ENDPOINTS)}")
            if endpoint == "reset":
                noise[0] = np.random.default_rng(self.served.keys.reset_seed(message))
                return None
            return self.served.prepare(self.served.keys.read(message), noise[0])
        except (ValueError, TypeError) as error:
            raise Refusal("invalid_input", error) from error
        except Exception as error:  # the server goes on
            traceback.print_exc()
            raise Refusal("internal", error) from error

    # ------------------------------------------------------------------ batches

    async def _answer_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            batch = self._take()
            if not batch:
                continue
            begin = time.perf_counter()
            try:
                results = await loop.run_in_executor(
                    self._computer, self.served.predict, [one.prepared for one in batch]
                )
            except Exception as error:  # the server goes on
                traceback.print_exc()
                results = [InternalError(f"{type(error).__name__}: {error}")] * len(batch)
            seconds = time.perf_counter() - begin
            self.metrics.infer.observe(seconds)
            self.metrics.batch.observe(len(batch))
            for one, result in zip(batch, results, strict=True):
                if not one.answer.done():
                    one.answer.set_result((result, seconds))
            del batch, results  # not held while nobody asks

    async def _gather(self) -> None:
        """Waits until as many requests are there as a batch has or as there are connections, `batch_wait_s` at most."""
        end = time.perf_counter() + self.batch_wait_s
        while len(self._waiting) < min(self.max_batch, len(self.budget.admitted)):
            left = end - time.perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[Waiting]:
        """The first request whose client is there, and those of its kind."""
        self._waiting = [one for one in self._waiting if not one.answer.done()]
        if not self._waiting:
            return []
        kind = self._waiting[0].prepared.kind
        batch = [one for one in self._waiting if one.prepared.kind == kind][: self.max_batch]
        taken = set(map(id, batch))
        self._waiting = [one for one in self._waiting if id(one) not in taken]
        return batch


def _bytes(header: str) -> bytes:
    return header.encode(errors="surrogateescape")
