"""Talks to a policy server on openpi's wire, ours or another. Needs websockets, msgpack and numpy, not torch: it may
run on the robot's own computer.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from stereovla.serving import wire
from stereovla.serving.observation_keys import ENDPOINT, IGNORED, OPENPI, OTHERS, ObservationKeys

API_KEY = "STEREOVLA_API_KEY"  # environment variable, of server and client
MAX_ANSWER_BYTES = 2**28
RETRY_S = 0.5
PASSING = (429, 502, 503, 504)  # status of a proxy whose server is not there yet


class PolicyError(RuntimeError):
    """No answer. kind: what the server says ("malformed", "invalid_input", "internal", "busy", "late", "closing"; of
    another server "refused"), or "unreachable", "denied" (its key), "lost" (the connection), "timeout", "answer" (one
    that cannot be used), "changed" (after reconnecting it was another model), "request" (what cannot be sent).
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Prediction:
    """actions float32 (chunk, A) in the robot's units, as `metadata` names them; timing: ms, `infer_ms` in the model;
    outputs: what else was asked for: "keyframe" (S,) with "keyframe_valid", "disparity" (h, w) px of the processed left
    view, "depth" {view: (h, w) m}.
    """

    actions: np.ndarray
    timing: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)


class PolicyClient:
    """One connection, opened anew where it was lost; not for several threads at once. Usable in a `with` statement.
    Every failure is a `PolicyError`.

    Args:
        url: ws://host:port of the server.
        timeout_s: longest wait for an answer, reconnecting included.
        wait_s: how long to wait for a server that is not there yet, or again.
        api_key: what the server asks for; None = that of the environment variable STEREOVLA_API_KEY, if it is set.
        keys: as of `ObservationKeys`, for a server that does not say its own, whose views they name; the first of each
            is sent.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8765",
        timeout_s: float = 60.0,
        wait_s: float = 0.0,
        api_key: str | None = None,
        keys: Mapping[str, Any] | None = None,
    ):
        self.url, self.timeout_s, self.wait_s = url, timeout_s, wait_s
        key = os.environ.get(API_KEY, "") if api_key is None else api_key
        self._headers = {"Authorization": f"Api-Key {key}"} if key else {}
        self._opened = ExitStack()  # ends the connection
        self._connection: ClientConnection | None = None
        self._greeting = b""
        self._open(time.monotonic() + wait_s, timeout_s)
        self.metadata = self._unpacked(self._greeting)
        self.is_ours = "views" in self.metadata and "keys" in self.metadata
        try:
            self._keys = self._keys_of(self.metadata, keys)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # metadata may be anything
            self.close()
            raise PolicyError("answer", f"the keys of {url} cannot be used: {error}") from error

    def _keys_of(self, metadata: Mapping[str, Any], keys: Mapping[str, Any] | None) -> ObservationKeys:
        if self.is_ours:
            told = [metadata[name] for name in ("views", "depths", "outputs")]
            return ObservationKeys(*told, keys=metadata["keys"], calibration=metadata["calibration"])
        views = [name for name in keys or OPENPI if name not in (*OTHERS, IGNORED) and name[:6] != "depth."]
        return ObservationKeys(
            views, keys={**{name: OPENPI[name] for name in (*views, *OTHERS) if name in OPENPI}, **(keys or {})}
        )

    @property
    def view_names(self) -> tuple[str, ...]:
        """Views that can be sent."""
        return self._keys.views

    # ------------------------------------------------------------------ asking

    def predict(
        self,
        left: Any,
        right: Any,
        instruction: str,
        state: Any,
        embodiment: str | None = None,
        seed: int | None = None,
        views: Mapping[str, Any] | None = None,
        depths: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        outputs: tuple[str, ...] = (),
        running_actions: Any = None,
        delay: int | None = None,
    ) -> Prediction:
        """The action chunk for one stereo pair, or what else `metadata["views"]` names.

        Args:
            left, right: RGB (H, W, 3) uint8, arrays or PIL images, or the bytes of a JPEG or PNG; right is None for a
                model that has none.
            state: (S,) or (k, S), oldest first, robot units.
            embodiment: of `metadata["embodiments"]`; None where it knows one.
            seed: of the noise that the chunk starts from; None = the next of this connection's.
            views: further ones by their names, those that are there.
            depths: {view: (H, W) float m, 0 = unknown}, for a model that is shown the true depth.
            calibration: of the left view and the pair: focal_length_px, principal_point_px, baseline_m and, where it is
                known, transform_camera_to_base; for a model whose `metadata["calibration"]` is not empty.
            outputs: of `metadata["outputs"]`, wanted beside the actions.
            running_actions: (n, A), robot units, what is left of the chunk that is executed, as actions that begin at
                `state`; the answer continues it. delay: how many of them will have been executed when it comes.
        """
        pictures = {"left": left, "right": right, **(views or {})}
        values: dict[str, Any] = {
            **{name: _picture(view) for name, view in pictures.items() if view is not None},
            **{f"depth.{name}": np.asarray(depth, dtype=np.float32) for name, depth in (depths or {}).items()},
            **{f"calibration.{name}": np.asarray(value, np.float64) for name, value in (calibration or {}).items()},
            "instruction": instruction,
            "state": np.asarray(state, dtype=np.float32),
            "embodiment": embodiment,
            "seed": seed,
            "outputs": list(outputs) or None,
            "running_actions": None if running_actions is None else np.asarray(running_actions, dtype=np.float32),
            "delay": delay,
        }
        try:
            message = self._keys.message(**{name: value for name, value in values.items() if value is not None})
        except ValueError as error:
            raise PolicyError("request", str(error)) from error
        answer = self.infer(message)
        actions = answer.pop("actions")
        return Prediction(actions, answer.pop("server_timing", {}), answer)

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to an observation as it is: {"actions": (chunk, A), "server_timing": {...}, ...}."""
        answer = self._ask(observation)
        if not isinstance(answer.get("actions"), np.ndarray):
            raise PolicyError("answer", f"{self.url} answered without actions: {wire.shown(answer)}")
        return answer

    def reset(self, seed: int | None = None) -> None:
        """An episode begins: what is asked without a seed has the noise that follows from this one, new if None. For
        a server of ours; another's policy is told nothing, as openpi's client does.
        """
        if self.is_ours:
            self._ask({ENDPOINT: "reset"} | ({} if seed is None else {"seed": seed}))

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            data = wire.pack(dict(message))
        except (TypeError, ValueError, OverflowError) as error:
            raise PolicyError("request", str(error)) from error
        limit = self.metadata.get("max_message_bytes") if self.is_ours else None
        if limit is not None and len(data) > limit:
            raise PolicyError("request", f"the request has {len(data):,} bytes, the server accepts {limit:,}")
        end = time.monotonic() + self.timeout_s
        again = self._connection is not None  # it may have been lost since the last answer
        while True:
            if self._connection is None:
                self._open(min(time.monotonic() + self.wait_s, end), end - time.monotonic())
            try:
                answer = self._received(end, data)
            except PolicyError as error:
                if error.kind != "lost" or not again:
                    raise
                again = False
                continue
            if isinstance(answer, str):
                self.close()  # as the server does
                kind, mark, text = answer.partition(": ")
                ours = self.is_ours and mark and kind.isidentifier()
                raise PolicyError(*((kind, text) if ours else ("refused", answer)))
            return self._unpacked(answer)

    # ------------------------------------------------------------------ the connection

    def _open(self, until: float, timeout_s: float) -> None:
        """Connects and hears the greeting; tries again `until` then where nobody answers."""
        while True:
            try:
                # proxy=None: a policy server is on this machine or in the same network
                opening = connect(
                    self.url,
                    open_timeout=max(timeout_s, 0.001),
                    max_size=MAX_ANSWER_BYTES,
                    compression=None,
                    proxy=None,
                    additional_headers=self._headers,
                )
                self._connection = self._opened.enter_context(opening)
                break
            except (OSError, WebSocketException, ValueError) as error:  # TimeoutError is an OSError
                status = error.response.status_code if isinstance(error, InvalidStatus) else None
                if status == 401:
                    text = error.response.body.decode(errors="replace").strip()
                    raise PolicyError("denied", f"{self.url} refuses this client: {text[:500]}") from error
                passing = status in PASSING or isinstance(error, OSError)
                if not passing or time.monotonic() + RETRY_S > until:
                    raise PolicyError("unreachable", f"no policy server answers at {self.url} ({error})") from error
                time.sleep(RETRY_S)
        greeting = self._received(time.monotonic() + timeout_s)
        if isinstance(greeting, str):
            self.close()
            raise PolicyError("answer", f"{self.url} greets with a text, not with metadata: {wire.shown(greeting)}")
        if self._greeting and greeting != self._greeting:
            self.close()
            raise PolicyError("changed", f"the server at {self.url} came back with other metadata; make a new client")
        self._greeting = greeting

    def _received(self, end: float, data: bytes | None = None) -> bytes | str:
        """The next message, after `data` was sent where there is any."""
        try:
            if data is not None:
                self._connection.send(data)
            return self._connection.recv(timeout=max(end - time.monotonic(), 0.001))
        except TimeoutError as error:
            self.close()  # a late answer would be taken for that of the next request
            raise PolicyError("timeout", f"no answer from {self.url} within {self.timeout_s:g} s") from error
        except (ConnectionClosed, OSError) as error:
            self.close()
            raise PolicyError("lost", f"{self.url}: {error}") from error

    def _unpacked(self, data: bytes) -> dict[str, Any]:
        try:
            return wire.unpack(data)
        except wire.WireError as error:
            self.close()
            raise PolicyError("answer", f"{self.url} speaks another language: {error}") from error

    def close(self) -> None:
        """Ends the connection; the next request opens another."""
        self._connection = None
        self._opened.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _picture(view: Any) -> Any:
    return view if isinstance(view, bytes) else np.asarray(view)
