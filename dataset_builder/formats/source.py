"""A dataset of another format, as an import reads it: episode by episode, first everything but the pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class EpisodeError(ValueError):
    """An episode that cannot be read at all; the message says why."""


@dataclass(frozen=True)
class SourceEpisode:
    """One episode as its source tells it.

    Args:
        timestamps_s: (n,) from the episode's start.
        states, actions: (n, ...) vectors for `map_motion`; no actions where they follow from the states.
        tasks: n instructions.
        calibration: per key of the schema (n, ...) values, of the views before crop and resize; {} where the rig has
            none.
        problems: what the source found wrong itself.
        cut: frames at the end that the source left out, as it was asked to.
    """

    timestamps_s: np.ndarray
    states: np.ndarray
    actions: np.ndarray | None
    tasks: Sequence[str]
    calibration: Mapping[str, np.ndarray]
    problems: Sequence[str] = ()
    cut: int = 0


class Source(Protocol):
    """A dataset of another format."""

    fps: float

    def content(self) -> dict[str, Any]:
        """What identifies the data (JSON-able): an unfinished import goes on only where it is the same."""

    def splits(self) -> dict[str, list[str]]:
        """Names of the episodes of every split, in their order."""

    def read(self, name: str) -> SourceEpisode:
        """Everything of one episode but its pictures; EpisodeError where that fails."""

    def pictures(self, name: str, episode: SourceEpisode) -> Iterator[dict[str, np.ndarray | None]]:
        """Its pictures frame by frame, {view: uint8 (h, w, 3) RGB}, None where a further view is absent; VideoError
        where that fails.
        """
