"""Streams whose samples are dealt to lanes, so that they resume to the exact sample, with any number of consumers.

The lanes take turns; a consumer (one DataLoader worker of one rank) owns every N-th lane. Where a lane stands is all
there is to save, and lanes can be dealt to another number of consumers after a restart: no sample is lost, none comes
twice.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info


class LaneStream(IterableDataset):
    """Base of streams; those say what a stream is (`_identity`), where a lane starts (`_start`) and what it yields
    (`_lane`).

    Args:
        lanes: at least as many as there are consumers.
        rank, world_size: of this process among those that train together.
    """

    def __init__(self, lanes: int, rank: int, world_size: int):
        super().__init__()
        if lanes < 1:
            raise ValueError(f"lanes={lanes} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in [0, world_size={world_size})")
        self.lanes, self.rank, self.world_size = lanes, rank, world_size
        self._loaded: dict[str, Any] | None = None
        self._positions: dict[int, dict[str, Any]] = {}
        self._next_lane = 0
        self.rotation = 0  # worker w reads what belongs to worker w + rotation: where DataLoader would have gone on

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What must not change between saving and loading a state; JSON-able."""

    @abstractmethod
    def _start(self) -> dict[str, Any]:
        """Position of a lane before its first sample; JSON-able."""

    @abstractmethod
    def _lane(self, lane: int, position: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Samples of one lane from `position` on, which is kept up to date."""

    def _lane_state(self, lane: int) -> dict[str, Any]:
        """What is saved of a lane."""
        return deepcopy(self._positions[lane])

    def _consumer(self) -> tuple[int, int]:
        """(number of this consumer, number of consumers) over all ranks and DataLoader workers."""
        worker = get_worker_info()
        workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return self.rank * workers + (worker_id + self.rotation) % workers, self.world_size * workers

    def _rewind(self) -> None:
        consumer, consumers = self._consumer()
        self._positions = {lane: self._start() for lane in range(consumer, self.lanes, consumers)}
        self._next_lane = consumer

    def state_dict(self) -> dict[str, Any]:
        """Position after the last sample yielded by this consumer; JSON-able."""
        if not self._positions:
            self._rewind()
        consumer, consumers = self._consumer()
        # those of other consumers may be there: loaded with the rest, and not yet iterated
        mine = [lane for lane in self._positions if lane % consumers == consumer]
        return {
            "stream": self._identity(),
            "lanes": {str(lane): self._lane_state(lane) for lane in mine},
            "next_lane": self._next_lane if self._loaded is None else self._turn(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state` at the next `iter()`. It must cover this consumer's lanes; `merge_states` joins those of
        several.
        """
        for name, value in self._identity().items():
            if state["stream"].get(name) != value:
                raise ValueError(f"the saved stream has {name}={state['stream'].get(name)}, this one {name}={value}")
        self._loaded = dict(state)
        self._positions = {int(lane): deepcopy(position) for lane, position in state["lanes"].items()}
        self._next_lane = state["next_lane"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        consumer, consumers = self._consumer()
        if consumers > self.lanes:
            raise ValueError(
                f"{consumers} consumers (ranks x workers) share {self.lanes} lanes; raise lanes to {consumers} or more"
            )
        mine = range(consumer, self.lanes, consumers)
        if self._loaded is None:
            self._rewind()
        else:
            missing = [lane for lane in mine if str(lane) not in self._loaded["lanes"]]
            if missing:
                raise ValueError(
                    f"the saved state lacks lanes {missing} of consumer {consumer} of {consumers}: merge_states first"
                )
            self._positions = {lane: deepcopy(self._loaded["lanes"][str(lane)]) for lane in mine}
            self._next_lane = self._turn()
            self._loaded = None
        streams = {lane: self._lane(lane, self._positions[lane]) for lane in mine}
        while streams:
            lane = self._next_lane
            sample = next(streams[lane], None) if lane in streams else None
            following = lane + consumers
            self._next_lane = following if following < self.lanes else consumer
            if sample is None:
                streams.pop(lane, None)
            else:
                yield sample

    def _turn(self) -> int:
        """The lane that comes next in the loaded state; this consumer's first one if it was of other consumers."""
        consumer, consumers = self._consumer()
        turns = self._loaded.get("turns", [self._loaded["next_lane"]])
        mine = [lane for lane in turns if lane % consumers == consumer] if len(turns) == consumers else []
        return mine[0] if mine else consumer


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the states of all consumers of one stream, so that any number of consumers can load the result."""
    lanes: dict[str, Any] = {}
    for state in states:
        if state["stream"] != states[0]["stream"]:
            raise ValueError(f"states of different streams: {states[0]['stream']} and {state['stream']}")
        repeated = sorted(set(lanes) & set(state["lanes"]))
        if repeated:
            raise ValueError(f"two states hold the lanes {repeated}: they are not of one moment of one stream")
        lanes |= state["lanes"]
    turns = [state["next_lane"] for state in states]
    return {"stream": states[0]["stream"], "lanes": lanes, "next_lane": turns[0], "turns": turns}
