"""A policy behind a WebSocket is a policy: what a robot would be told, measured like any other."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.evaluation.policies import Observation, Policy
from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.observation_keys import read_keys
from stereovla.sources import InputError


class SocketPolicy(Policy):
    """Asks the server at `url` for each chunk, one after the other; usable in a `with` statement.

    A server of ours is told what its metadata name. One of openpi's is told the views, the present state and the
    instruction, under the names of its DROID policies or those of `keys`, a JSON file (see `ObservationKeys`), and
    decides the noise itself.

    The noise that a chunk of ours starts from is that of `ModelPolicy.noise`: numpy seeds a generator with the pair
    (seed, step) as with the number whose 32-bit words, lowest first, they are.
    """

    name = "served"
    needs_images = True

    def __init__(self, url: str, keys: str | Path = ""):
        try:
            self.named = read_keys(keys) if keys else {}
            self.client = PolicyClient(url, keys=self.named)
        except (OSError, PolicyError) as error:  # a file that cannot be read; no such host, no answer in time, no key
            raise InputError(f"{error}; `stereovla serve` starts a server") from error
        self.needs_depth = self.client.is_ours and bool(self.client.metadata["depths"])

    @property
    def identity(self) -> dict[str, str]:
        """What the server says of its model; of one that says nothing, where it is and what it does say."""
        told = self.client.metadata
        if "model" not in told:
            return {"url": self.client.url, "metadata": json.dumps(told, sort_keys=True, default=repr)}
        return {name: str(told[name]) for name in ("model", "revision") if name in told}

    def act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        ask = self._ask if self.client.is_ours else self._ask_other
        return [ask(observation) for observation in observations]

    def _ask(self, o: Observation) -> np.ndarray:
        told = self.client.metadata
        return self.client.predict(
            o.left,
            o.right if "right" in told["views"] else None,
            o.instruction,
            o.states[-told["state_history"] :],
            o.embodiment,
            seed=o.seed + (o.step << 32),
            views={name: o.views[name] for name in told["views"] if name in o.views},
            depths={name: o.depths[name] for name in told["depths"] if name in o.depths},
            calibration=o.calibration if told["calibration"] else None,
            running_actions=o.running_actions,
            delay=None if o.running_actions is None else o.delay,
        ).actions

    def _ask_other(self, o: Observation) -> np.ndarray:
        sent = {name: view for name, view in o.all_views.items() if name in self.client.view_names}
        left, right = sent.pop("left", None), sent.pop("right", None)
        actions = self.client.predict(left, right, o.instruction, o.states[-1], views=sent).actions
        return np.asarray(actions, np.float32)

    def __enter__(self) -> "SocketPolicy":
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.close()
