"""Talks to a policy server. Needs websockets, msgpack and numpy, not torch: it may run on the robot's own computer."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from stereovla.serving import protocol


class PolicyError(RuntimeError):
    """The server could not answer. kind: "malformed", "invalid_input", "internal", "closing" (it shuts down), or
    "closed", a lost connection.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Prediction:
    """actions float32 (chunk, 7): dx, dy, dz m, droll, dpitch, dyaw rad, gripper command; latency_s: in the server."""

    actions: np.ndarray
    latency_s: float
    model: str


class PolicyClient:
    """One connection; not for several threads at once. Usable in a `with` statement.

    Args:
        url: ws://host:port of the server.
        timeout_s: longest wait for the connection and for an answer.
    """

    def __init__(self, url: str = "ws://127.0.0.1:8765", timeout_s: float = 60.0):
        self.timeout_s = timeout_s
        # proxy=None: a policy server is on this machine or in the same network
        opening = connect(url, open_timeout=timeout_s, max_size=None, compression=None, proxy=None)
        self._open = ExitStack()
        self._connection = self._open.enter_context(opening)
        self.hello = self._receive("hello")
        if self.hello["protocol"] != protocol.VERSION:
            self.close()
            raise PolicyError(
                "malformed", f"the server speaks protocol {self.hello['protocol']}, not {protocol.VERSION}"
            )

    def predict(
        self,
        left: Any,
        right: Any,
        instruction: str,
        state: Any,
        embodiment: str,
        seed: int | None = None,
        views: Mapping[str, Any] | None = None,
        depths: Mapping[str, Any] | None = None,
    ) -> Prediction:
        """The action chunk for one stereo pair, or what else `hello["views"]` names.

        Args:
            left, right: RGB (H, W, 3) uint8, arrays or PIL images; right is None for a model that has none.
            state: (7,) or (k, 7), oldest first, robot units.
            seed: of the noise that the chunk starts from; None = new noise each time.
            views: further ones by their names, those that are there.
            depths: {view: (H, W) float m, 0 = unknown}, for a model that is shown the true depth.
        """
        pictures = {"left": left, "right": right} | {f"view.{name}": view for name, view in (views or {}).items()}
        maps = {"depth" if name == "left" else f"depth.{name}": depth for name, depth in (depths or {}).items()}
        request: dict[str, Any] = {
            "type": "predict",
            **{key: np.asarray(picture) for key, picture in pictures.items() if picture is not None},
            **{key: np.asarray(depth, dtype=np.float32) for key, depth in maps.items()},
            "instruction": instruction,
            "state": np.asarray(state, dtype=np.float32),
            "embodiment": embodiment,
        }
        if seed is not None:
            request["seed"] = seed
        data = protocol.pack(request)
        limit = self.hello["max_message_bytes"]
        if len(data) > limit:
            raise PolicyError("invalid_input", f"the request has {len(data):,} bytes, the server accepts {limit:,}")
        self._connection.send(data)
        answer = self._receive("prediction")
        return Prediction(answer["actions"], answer["latency_s"], answer["model"])

    def _receive(self, expected: str) -> dict[str, Any]:
        try:
            message = protocol.unpack(self._connection.recv(timeout=self.timeout_s))
        except TimeoutError as error:
            self.close()  # a late answer would be taken for that of the next request
            raise PolicyError("closed", f"no answer within {self.timeout_s} s") from error
        except ConnectionClosed as error:
            raise PolicyError("closed", str(error)) from error
        if message.get("type") == "error":
            raise PolicyError(message["kind"], message["message"])
        if message.get("type") != expected:
            raise PolicyError("malformed", f"the server answered {message.get('type')!r} instead of {expected!r}")
        return message

    def close(self) -> None:
        """Ends the connection."""
        self._open.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
