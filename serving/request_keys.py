"""What the requests to a model hold, by the views that it sees."""

import difflib
from dataclasses import dataclass
from typing import Any

from stereovla.serving import protocol

PAIR = ("left", "right")


@dataclass(frozen=True)
class RequestKeys:
    """What requests to a model hold.

    Args:
        views: names of those that it sees. named: whether its processor takes them by name; else it takes a pair.
        depth: whether it is shown the true depth.
    """

    views: tuple[str, ...]
    named: bool
    depth: bool

    @classmethod
    def of(cls, config: Any, processor: Any) -> "RequestKeys":
        """Of a model of any version: earlier ones all see a pair."""
        depth = getattr(config, "depth_config", None)
        named = hasattr(processor, "views")
        return cls(tuple(processor.pixel_views) if named else PAIR, named, depth is not None and depth.input == "depth")

    @property
    def needed(self) -> tuple[str, ...]:
        sides = [name for name in self.views if name in PAIR]
        return ("type", *sides, *(["depth"] if self.depth else []), "instruction", "state", "embodiment")

    @property
    def optional(self) -> tuple[str, ...]:
        further = [name for name in self.views if name not in PAIR]
        maps = [f"depth.{name}" for name in self.views[1:]] if self.depth else []
        return (*(f"view.{name}" for name in further), *maps, "seed")

    def check(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message, if it is a request with the keys that it needs and no others; ProtocolError otherwise."""
        kind = message.get("type")
        if not isinstance(kind, str) or kind != "predict":
            raise protocol.ProtocolError(f"type is {protocol.shown(kind)}; the only request is 'predict'")
        views = f"this model's views are {', '.join(self.views)}"
        missing = [key for key in self.needed if key not in message]
        if missing:
            raise protocol.ProtocolError(f"the request lacks {', '.join(missing)}; {views}")
        known = self.needed + self.optional
        for key in message:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1) if isinstance(key, str) else []
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise protocol.ProtocolError(f"unknown key {protocol.shown(key)}; {hint}; {views}")
        seed = message.get("seed")
        if seed is not None and (type(seed) is not int or seed < 0):
            raise protocol.ProtocolError(
                f"seed is {protocol.shown(seed)}; it must be an integer of at least 0, or absent"
            )
        return message

    def images(self, request: dict[str, Any]) -> dict[str, Any] | list[Any]:
        """The views of a request as the processor takes them."""
        if not self.named:
            return [request["left"], request["right"]]
        return {name: request.get(name if name in PAIR else f"view.{name}") for name in self.views}

    def depths(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its depth maps."""
        keys = {name: "depth" if name == "left" else f"depth.{name}" for name in self.views}
        return {name: request[key] for name, key in keys.items() if key in request}
