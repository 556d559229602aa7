"""Training windows from a streamed dataset: shuffled, split over ranks and workers, resumable to the exact window.

How the order is made. A *unit* is a shard, or every k-th episode of it where there are fewer shards than lanes. Each
epoch permutes the units and deals them to `lanes` lanes. A lane reads `pool_episodes` episodes as encoded bytes and
emits their windows in a random order, then goes on. The lanes take turns; a consumer (one DataLoader worker of one
rank) owns every N-th lane. All permutations are functions of (seed, epoch, place), so the state of a lane is four
numbers, and lanes can be dealt to another number of consumers after a restart: no window is lost, none comes twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from huggingface_hub import hf_hub_download
from torch.utils.data import IterableDataset, get_worker_info

from dataset_builder import questions, schema
from dataset_builder.episodes import EpisodeSource
from dataset_builder.shards import read_json
from dataset_builder.windows import DEPTH, SEGMENTATION, WindowPool

_EMPTY_EPOCHS = 200  # an endless lane that found no window in so many epochs never will


class WindowStream(IterableDataset):
    """Endless (or `epochs` long) stream of windows as in `schema.WINDOW`.

    Args:
        path: folder or Hub id.
        split: "train", "validation", ...
        chunk_size: actions per window, at most the data's plan length where it has `action_plan`.
        history: states per window, the present one included.
        mixture: relative frequency of the objectives; None = the paper's action : depth : box : pose = 5 : 2 : 2 : 1.
        depth_points, points_per_question: see `questions.QuestionConfig`.
        depth_map_share: share of the windows that carry the depth map (for a disparity loss), drawn per window; 0 costs
            least, and needs no depth in the data where the mixture asks for none.
        shuffle: False reads units and frames in their stored order.
        epochs: passes over the data; None = endless.
        lanes, pool_episodes: see the module's docstring. Together they decide how well the order is mixed, and the
            memory: about lanes * pool_episodes * (frames per episode) * 30 kB at 128x128.
        rank, world_size: of this process among those that train together.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        chunk_size: int = 8,
        history: int = schema.HISTORY,
        mixture: Mapping[str, float] | None = None,
        depth_points: str = "interaction",
        points_per_question: int = 1,
        depth_map_share: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        lanes: int = 8,
        pool_episodes: int = 16,
        rank: int = 0,
        world_size: int = 1,
        revision: str | None = None,
        retries: int = 3,
        backoff_s: float = 0.5,
    ):
        super().__init__()
        for name, value in {
            "chunk_size": chunk_size,
            "history": history,
            "lanes": lanes,
            "pool_episodes": pool_episodes,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in [0, world_size={world_size})")
        if not 0 <= depth_map_share <= 1:
            raise ValueError(f"depth_map_share={depth_map_share} must be in [0, 1]")
        self.question_config = questions.QuestionConfig(
            mixture=questions.PAPER_MIXTURE if mixture is None else mixture,
            depth_points=depth_points,
            points_per_question=points_per_question,
        )
        self.chunk_size, self.history, self.depth_map_share = chunk_size, history, depth_map_share
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.lanes, self.pool_episodes = lanes, pool_episodes
        self.rank, self.world_size = rank, world_size
        self._source_arguments = {
            "path": path,
            "split": split,
            "revision": revision,
            "retries": retries,
            "backoff_s": backoff_s,
            "columns": self._needed_columns(),
            "wanted": (
                "action_plan",
                "action_plan_length",
                "keyframe_pose",
                "state_is_pose",
                "target.box_left_px",
                "target.box_right_px",
            ),
        }
        self._source: EpisodeSource | None = None
        self.num_shards = len(self._open().shards)
        self._stripes = -(-lanes // self.num_shards)  # units per shard, so that no lane goes without
        self._loaded: dict[str, Any] | None = None
        self._positions: dict[int, dict[str, int]] = {}
        self._next_lane = 0

    def _needed_columns(self) -> list[str]:
        config, needed = self.question_config, []
        if config.asks("depth") or self.depth_map_share:
            needed.append(DEPTH)
        if config.asks("depth") and config.depth_points == "interaction":
            needed.append(SEGMENTATION)
        if config.asks("action") or config.asks("pose"):
            needed.append("keyframe_pose")
        if config.asks("box"):
            needed += ["target.box_left_px", "target.box_right_px"]
        return needed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}  # a worker process opens the dataset itself

    def _open(self) -> EpisodeSource:
        if self._source is None:
            self._source = EpisodeSource(**self._source_arguments)
        return self._source

    def _consumer(self) -> tuple[int, int]:
        """(number of this consumer, number of consumers) over all ranks and DataLoader workers."""
        worker = get_worker_info()
        workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return self.rank * workers + worker_id, self.world_size * workers

    def _identity(self) -> dict[str, Any]:
        """What must not change between saving and loading a state."""
        return {
            "split": self._source_arguments["split"],
            "num_shards": self.num_shards,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "lanes": self.lanes,
            "pool_episodes": self.pool_episodes,
        }

    def _rewind(self) -> None:
        consumer, consumers = self._consumer()
        start = {"epoch": 0, "unit": 0, "row": 0, "offset": 0}
        self._positions = {lane: dict(start) for lane in range(consumer, self.lanes, consumers)}
        self._next_lane = consumer

    def state_dict(self) -> dict[str, Any]:
        """Position after the last window yielded by this consumer; JSON-able."""
        if not self._positions:
            self._rewind()
        lanes = {str(lane): dict(position) for lane, position in self._positions.items()}
        return {"stream": self._identity(), "lanes": lanes, "next_lane": self._next_lane}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state` at the next `iter()`. It must cover this consumer's lanes; `merge_states` joins those of
        several.
        """
        for name, value in self._identity().items():
            if state["stream"].get(name) != value:
                raise ValueError(f"the saved stream has {name}={state['stream'].get(name)}, this one {name}={value}")
        self._loaded = dict(state)
        self._positions = {int(lane): dict(position) for lane, position in state["lanes"].items()}
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
            self._positions = {lane: dict(self._loaded["lanes"][str(lane)]) for lane in mine}
            self._next_lane = self._loaded["next_lane"] if self._loaded["next_lane"] in mine else consumer
            self._loaded = None
        streams = {lane: self._lane(lane, self._positions[lane]) for lane in mine}
        while streams:
            lane = self._next_lane
            window = next(streams[lane], None) if lane in streams else None
            following = lane + consumers
            self._next_lane = following if following < self.lanes else consumer
            if window is None:
                streams.pop(lane, None)
            else:
                yield window

    def _units(self, epoch: int, lane: int) -> np.ndarray:
        units = np.arange(self.num_shards * self._stripes)
        if self.shuffle:
            units = np.random.default_rng((self.seed, epoch)).permutation(units)
        return units[lane :: self.lanes]

    def _lane(self, lane: int, position: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Windows of one lane from `position` on, which is kept up to date."""
        found_in = position["epoch"]
        while self.epochs is None or position["epoch"] < self.epochs:
            units = self._units(position["epoch"], lane)
            while position["unit"] < len(units):
                for pool, end in self._pools(int(units[position["unit"]]), position["row"]):
                    found_in = position["epoch"]
                    order = self._order(pool, position, int(units[position["unit"]]))
                    while position["offset"] < len(order):
                        index = int(order[position["offset"]])
                        position["offset"] += 1
                        yield self._window(pool, index, position["epoch"])
                    position |= {"row": end, "offset": 0}
                position |= {"unit": position["unit"] + 1, "row": 0, "offset": 0}
            position |= {"epoch": position["epoch"] + 1, "unit": 0}
            if position["epoch"] - found_in > _EMPTY_EPOCHS:
                raise ValueError(
                    f"lane {lane} of {self.lanes} finds no episodes: lower lanes to the number of episodes or below"
                )

    def _order(self, pool: WindowPool, position: Mapping[str, int], unit: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(pool.size)
        return np.random.default_rng((self.seed, position["epoch"], unit, position["row"])).permutation(pool.size)

    def _pools(self, unit: int, row: int) -> Iterator[tuple[WindowPool, int]]:
        """(pool, row after it) of one unit from `row` on."""
        shard, stripe = divmod(unit, self._stripes)
        tables: list[pa.Table] = []
        end = row
        for end, table in self._open().read(shard, row):
            if table["episode_index"][0].as_py() % self._stripes == stripe:
                tables.append(table)
            if len(tables) == self.pool_episodes:
                yield WindowPool(tables, self.history, self.chunk_size), end
                tables = []
        if tables:
            yield WindowPool(tables, self.history, self.chunk_size), end

    def _window(self, pool: WindowPool, index: int, epoch: int) -> dict[str, Any]:
        window = pool.window(index)
        config = self.question_config
        if not self.depth_map_share and config.only is not None:
            return window | {"objective": config.only}  # nothing to draw: saves 5 % of the time
        rng = questions.window_generator(self.seed, epoch, window["episode_index"], window["frame_index"])
        carries_depth = rng.random() < self.depth_map_share
        possible = [*questions.ALWAYS_POSSIBLE] + (["box"] if np.isfinite(window["boxes"]).all() else [])
        objective = questions.draw_objective(config, rng, [*possible, "depth"])
        if carries_depth or objective == "depth":
            depth = pool.image(DEPTH, index)
            if carries_depth:
                window["depth"] = depth
        if objective == "depth":
            segmentation = pool.image(SEGMENTATION, index) if config.depth_points == "interaction" else None
            asked = questions.depth_points(depth, segmentation, window["points"][1], config, rng)
            if asked is None:  # neither target nor gripper in view: ask something else of the mixture
                objective = questions.draw_objective(config, rng, possible)
            else:
                window["points_px"], window["depths_m"] = asked
        window["objective"] = objective
        return window


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
    return {"stream": states[0]["stream"], "lanes": lanes, "next_lane": states[0]["next_lane"]}


def load_meta(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What a dataset (folder or Hub id) says of itself: meta/info.json (`tasks`, `fps`, `splits`, ...) and `stats`."""

    def read(name: str) -> Any:
        if Path(path).is_dir():
            return read_json(Path(path) / "meta" / name)
        return read_json(Path(hf_hub_download(str(path), f"meta/{name}", repo_type="dataset", revision=revision)))

    return {**read("info.json"), "stats": read("stats.json")}
