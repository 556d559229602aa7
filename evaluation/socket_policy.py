"""A policy behind a WebSocket is a policy: what a robot would be told, measured like any other."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stereovla.evaluation.policies import Observation, Policy
from stereovla.serving.client import PolicyClient
from stereovla.sources import InputError


class SocketPolicy(Policy):
    """Asks the server at `url` for each chunk, one after the other; usable in a `with` statement.

    The noise that a chunk starts from is that of `ModelPolicy.noise`: numpy seeds a generator with the pair
    (seed, step) as with the number whose 32-bit words, lowest first, they are.
    """

    name = "served"
    needs_images = True

    def __init__(self, url: str):
        try:
            self.client = PolicyClient(url)
        except OSError as error:  # refused, no such host, no answer in time
            raise InputError(f"no policy server answers at {url} ({error}); `stereovla serve` starts one") from error
        self.needs_depth = self.client.hello["reads_depth"]

    def act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        history, names = self.client.hello["state_history"], self.client.hello["views"]
        return [
            self.client.predict(
                o.left,
                o.right if "right" in names else None,
                o.instruction,
                o.states[-history:],
                o.embodiment,
                seed=o.seed + (o.step << 32),
                views={name: o.views[name] for name in names if name in o.views},
                depths={name: o.depths[name] for name in names if name in o.depths} if self.needs_depth else None,
            ).actions
            for o in observations
        ]

    def __enter__(self) -> "SocketPolicy":
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.close()
