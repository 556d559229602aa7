"""Training windows from a streamed dataset: shuffled, split over ranks and workers, resumable to the exact window.

How the order is made. A *unit* is a shard, or every k-th episode of it where there are fewer shards than lanes. Each
epoch permutes the units and deals them to `lanes` lanes. A lane reads `pool_episodes` episodes as encoded bytes and
emits their windows in a random order, then goes on. The lanes take turns; a consumer (one DataLoader worker of one
rank) owns every N-th lane. All permutations are functions of (seed, epoch, place), so the state of a lane is four
numbers, and lanes can be dealt to another number of consumers after a restart: no window is lost, none comes twice.

Several datasets: each is dealt to the lanes as if it were alone, and each lane draws for every window which dataset it
comes from, as a function of (seed, lane, windows drawn so far). So all of the above holds for each dataset; each has
epochs of its own.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.shards import ShardError
from stereovla.dataset_builder.streaming import questions
from stereovla.dataset_builder.streaming.augmentation import PhotometricAugmentation
from stereovla.dataset_builder.streaming.episodes import EpisodeSource
from stereovla.dataset_builder.streaming.lanes import LaneStream
from stereovla.dataset_builder.streaming.mixture import Mixture, check_mixture
from stereovla.dataset_builder.streaming.windows import DEPTH, SEGMENTATION, WindowPool

_EMPTY_EPOCHS = 200  # an endless lane that found no window in so many epochs never will
_UNASKED_WINDOWS = 10_000  # nor one that found so many in a row of which nothing can be asked; about 20 s


class WindowStream(LaneStream):
    """Endless (or `epochs` long) stream of windows as in `schema.WINDOW`.

    Args:
        path: folder, Hub id or `id@revision`; or several of them with weights, [(path, weight), ...]: the shares of the
            windows that come from each.
        split: "train", "validation", ...
        chunk_size: actions per window, at most the data's plan length where it has `action_plan`.
        history: states per window, the present one included.
        mixture: relative frequency of the objectives; None = the paper's action : depth : box : pose = 5 : 2 : 2 : 1.
            A window without anything in view that it asks for is left out, and counted in `left_out_windows`.
        depth_points, points_per_question, detection_failures: see `questions.QuestionConfig`.
        questions_per_frame: how many objectives each frame is asked, drawn together so that they differ where the
            mixture allows; above 1 a window has those after its first as `further`, see `questions.questions_of`.
        depth_map_share: share of the windows that carry the depth map (for a disparity loss), drawn per window; 0 costs
            least, and needs no depth in the data where the mixture asks for none.
        shuffle: False reads units and frames in their stored order.
        epochs: passes over the data; None = endless. Of several datasets each is passed over so many times, the weights
            deciding the order; what is left when one has ended is shared by the others.
        lanes, pool_episodes: see the module's docstring. Together they decide how well the order is mixed, and the
            memory: about lanes * pool_episodes * (frames per episode) * 30 kB at 128x128.
        rank, world_size: of this process among those that train together.
        retries, backoff_s: see `EpisodeSource`.
        on_bad_shard: what becomes of shards that are not the manifest's, and of those that cannot be read, after the
            retries: "raise" = ShardError that names the shard, for the former when the stream is made; "skip" = warn,
            count it in `skipped_shards` and go on behind what is left of it, which is nothing of the former.
        augmentation: changes the colours of all views; None = as recorded.
        views: names of the views that the windows show: "left", which every dataset has; "right", which all must have
            where it is named, as for a model that sees pairs; and any others, None in the windows of those datasets and
            rows that have not got them. ValueError for one that no dataset has.
        segmentation: whether the windows carry the segmentation of the left view, where there is one.
        names: whether the windows carry what the objects in the left view are called (`questions.called`), and where
            they are, as far as the data says.
    """

    def __init__(
        self,
        path: str | Path | Mixture,
        split: str = "train",
        *,
        chunk_size: int = 8,
        history: int = schema.HISTORY,
        mixture: Mapping[str, float] | None = None,
        depth_points: str = "interaction",
        points_per_question: int = 1,
        detection_failures: float = 0.0,
        questions_per_frame: int = 1,
        depth_map_share: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        lanes: int = 8,
        pool_episodes: int = 16,
        rank: int = 0,
        world_size: int = 1,
        retries: int = 3,
        backoff_s: float = 0.5,
        on_bad_shard: Literal["raise", "skip"] = "raise",
        augmentation: PhotometricAugmentation | None = None,
        views: Sequence[str] = ("left", "right"),
        segmentation: bool = False,
        names: bool = False,
    ):
        super().__init__(lanes, rank, world_size)
        sizes = {"chunk_size": chunk_size, "history": history, "pool_episodes": pool_episodes}
        for name, value in (sizes | {"questions_per_frame": questions_per_frame}).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if on_bad_shard not in ("raise", "skip"):
            raise ValueError(f"on_bad_shard={on_bad_shard!r}; valid: 'raise', 'skip'")
        if not 0 <= depth_map_share <= 1:
            raise ValueError(f"depth_map_share={depth_map_share} must be in [0, 1]")
        if "left" not in views or len(set(views)) < len(views):
            raise ValueError(f"views={list(views)} must name left, the main view, and none twice")
        self.views, self.segmentation, self.names = tuple(views), segmentation, names
        self.question_config = questions.QuestionConfig(
            mixture=questions.PAPER_MIXTURE if mixture is None else mixture,
            depth_points=depth_points,
            points_per_question=points_per_question,
            detection_failures=detection_failures,
        )
        if questions_per_frame > 1 and self.question_config.only is not None:
            raise ValueError(
                f"questions_per_frame={questions_per_frame}, but the mixture asks for {self.question_config.only} "
                "alone: a frame is asked it once"
            )
        if self.question_config.asks("camera") and "right" not in views:
            raise ValueError(f"camera is asked, which needs a stereo pair; views={list(views)} has no right view")
        self.chunk_size, self.history, self.depth_map_share = chunk_size, history, depth_map_share
        self.questions_per_frame = questions_per_frame
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.pool_episodes = pool_episodes
        self.on_bad_shard, self.augmentation = on_bad_shard, augmentation
        self._paths, self._weights = zip(*check_mixture(path), strict=True)
        self._source_arguments = {
            "split": split,
            "retries": retries,
            "backoff_s": backoff_s,
            "skip": on_bad_shard == "skip",
            "columns": self._needed_columns(),
            "wanted": (
                "action_plan",
                "action_plan_length",
                "keyframe_pose",
                "keyframe_symmetry",
                "state_is_pose",
                "target.box_left_px",
                "target.box_right_px",
                *schema.CALIBRATION,
                *map(schema.image_key, self.views),
                *(schema.depth_key(view) for view in self.views if depth_map_share and view != "left"),
                *([SEGMENTATION] if segmentation or names else []),
                *([schema.OTHER_NAMES] if names else []),
            ),
        }
        self._sources: dict[int, EpisodeSource] = {}
        self._check_views()
        self._shards = [self._source(number).shards for number in range(len(self._paths))]
        # units per shard, so that no lane goes without
        self._stripes = [-(-lanes // len(names)) for names in self._shards]
        # how often each shard was given up by each lane, and how many windows were left out; in memory that DataLoader
        # workers share with this process
        self._skips = torch.zeros(lanes, sum(map(len, self._shards)), dtype=torch.int32).share_memory_()
        self._left_out = torch.zeros(lanes, dtype=torch.int64).share_memory_()

    def _check_views(self) -> None:
        there = {str(path): self._source(number).views for number, path in enumerate(self._paths)}
        if unknown := [view for view in self.views if not any(view in views for views in there.values())]:
            found = "; ".join(f"{', '.join(views)} in {path}" for path, views in there.items())
            raise ValueError(f"no dataset has the view {', '.join(unknown)}; there are: {found}")

    def _needed_columns(self) -> list[str]:
        config, needed = self.question_config, [schema.RIGHT] if "right" in self.views else []
        if config.asks("depth") or self.depth_map_share:
            needed.append(DEPTH)
        if config.asks("depth") and config.depth_points == "interaction":
            needed.append(SEGMENTATION)
        if config.asks("action") or config.asks("pose"):
            needed.append("keyframe_pose")
        if config.asks("box"):
            needed += [f"target.box_{side}_px" for side in ("left", "right") if side in self.views]
        if config.asks("camera"):
            needed += [schema.RIGHT, *schema.CALIBRATION]
        return needed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": {}}  # a worker process opens the datasets itself

    def _source(self, number: int) -> EpisodeSource:
        if number not in self._sources:
            self._sources[number] = EpisodeSource(self._paths[number], **self._source_arguments)
        return self._sources[number]

    @property
    def skipped_shards(self) -> dict[str, int]:
        """{shard: how often it was given up}, over all DataLoader workers of this process and what was resumed from."""
        names = [name for shards in self._shards for name in shards]
        counts = self._skips.sum(0).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}

    @property
    def unread_shards(self) -> dict[str, int]:
        """{shard: its frames as the manifest counts them} of those that are not the manifest's, which are never read,
        and of those that were given up, which may have been read in part.
        """
        skipped, sources = self.skipped_shards, [self._source(number) for number in range(len(self._paths))]
        return {
            name: rows
            for source in sources
            for name, rows in zip(source.shards, source.rows, strict=True)
            if name in source.bad or name in skipped
        }

    @property
    def left_out_windows(self) -> int:
        """Windows without anything in view that the mixture asks for, over all DataLoader workers of this process and
        what was resumed from.
        """
        return int(self._left_out.sum())

    def _identity(self) -> dict[str, Any]:
        """What must not change between saving and loading a state."""
        return {
            "split": self._source_arguments["split"],
            "num_shards": [len(names) for names in self._shards],
            "weights": list(self._weights),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "lanes": self.lanes,
            "pool_episodes": self.pool_episodes,
        }

    def _start(self) -> dict[str, Any]:
        return {"drawn": 0, "datasets": [{"epoch": 0, "unit": 0, "row": 0, "offset": 0} for _ in self._paths]}

    def _lane_state(self, lane: int) -> dict[str, Any]:
        skipped = self._skips[lane]
        counts = {str(shard): int(skipped[shard]) for shard in skipped.nonzero().flatten().tolist()}
        return {**super()._lane_state(lane), "skipped": counts, "left_out": int(self._left_out[lane])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._skips.zero_()
        self._left_out.zero_()
        for lane, position in state["lanes"].items():
            for shard, count in position["skipped"].items():
                self._skips[int(lane), int(shard)] = count
            self._left_out[int(lane)] = position["left_out"]

    def _lane(self, lane: int, state: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Windows of one lane from `state` on, which is kept up to date."""
        # ended before is the same as ended now: the draws below must see the datasets that an uninterrupted stream sees
        streams = {
            number: self._windows(lane, number, position)
            for number, position in enumerate(state["datasets"])
            if self.epochs is None or position["epoch"] < self.epochs
        }
        while streams:
            number = self._draw(lane, state["drawn"], list(streams))
            window = next(streams[number], None)
            if window is None:
                del streams[number]
            else:
                state["drawn"] += 1
                yield window

    def _draw(self, lane: int, drawn: int, numbers: Sequence[int]) -> int:
        if len(numbers) == 1:
            return numbers[0]
        ends = np.cumsum([self._weights[number] for number in numbers])
        place = np.random.default_rng((self.seed, lane, drawn)).random() * ends[-1]
        return numbers[int(np.searchsorted(ends, place, side="right"))]

    def _units(self, number: int, epoch: int, lane: int) -> np.ndarray:
        units = np.arange(len(self._shards[number]) * self._stripes[number])
        if self.shuffle:
            units = np.random.default_rng((self.seed, epoch)).permutation(units)
        return units[lane :: self.lanes]

    def _windows(self, lane: int, number: int, position: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Windows of dataset `number` in one lane from `position` on, which is kept up to date."""
        found_in, unasked = position["epoch"], 0
        while self.epochs is None or position["epoch"] < self.epochs:
            units = self._units(number, position["epoch"], lane)
            while position["unit"] < len(units):
                unit = int(units[position["unit"]])
                try:
                    for window in self._unit(number, unit, position):
                        found_in = position["epoch"]
                        unasked = 0 if window is not None else unasked + 1
                        if window is not None:
                            yield window
                            continue
                        self._left_out[lane] += 1
                        if unasked > _UNASKED_WINDOWS:
                            raise ValueError(
                                f"{unasked:,} windows of {self._paths[number]} in a row show nothing that the mixture "
                                f"asks for ({self.question_config.mixture}); ask for more than what is in view there"
                            )
                except ShardError as error:
                    if self.on_bad_shard == "raise":
                        raise
                    self._skip(lane, number, unit, error)
                position |= {"unit": position["unit"] + 1, "row": 0, "offset": 0}
            position |= {"epoch": position["epoch"] + 1, "unit": 0}
            if position["epoch"] - found_in > _EMPTY_EPOCHS:
                raise ValueError(
                    f"lane {lane} of {self.lanes} finds no episodes in {self._paths[number]}: lower lanes to the "
                    f"number of episodes or below; shards skipped: {self.skipped_shards or 'none'}"
                )

    def _skip(self, lane: int, number: int, unit: int, error: ShardError) -> None:
        shard = unit // self._stripes[number]
        self._skips[lane, sum(map(len, self._shards[:number])) + shard] += 1
        warnings.warn(f"skipped what is left of a shard: {error}", RuntimeWarning, stacklevel=2)

    def _unit(self, number: int, unit: int, position: dict[str, int]) -> Iterator[dict[str, Any] | None]:
        """Windows of a unit, None for those that cannot be asked anything of the mixture."""
        for pool, end in self._pools(number, unit, position["row"]):
            order = self._order(pool, position, unit)
            while position["offset"] < len(order):
                index = int(order[position["offset"]])
                position["offset"] += 1
                try:
                    window = self._window(pool, index, position["epoch"])
                except ShardError as error:
                    name = self._shards[number][unit // self._stripes[number]]
                    raise ShardError(f"shard {name}: {error}") from error
                yield window
            position |= {"row": end, "offset": 0}

    def _order(self, pool: WindowPool, position: Mapping[str, int], unit: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(pool.size)
        return np.random.default_rng((self.seed, position["epoch"], unit, position["row"])).permutation(pool.size)

    def _pools(self, number: int, unit: int, row: int) -> Iterator[tuple[WindowPool, int]]:
        """(pool, row after it) of one unit from `row` on."""
        shard, stripe = divmod(unit, self._stripes[number])
        tables: list[pa.Table] = []
        end = row
        for end, table in self._source(number).read(shard, row):
            if table["episode_index"][0].as_py() % self._stripes[number] == stripe:
                tables.append(table)
            if len(tables) == self.pool_episodes:
                yield WindowPool(tables, self.history, self.chunk_size, self.views), end
                tables = []
        if tables:
            yield WindowPool(tables, self.history, self.chunk_size, self.views), end

    def _window(self, pool: WindowPool, index: int, epoch: int) -> dict[str, Any] | None:
        window = pool.window(index)
        place = (self.seed, epoch, window["episode_index"], window["frame_index"])
        window["seed"] = self._drawn_seed(*place)
        if self.augmentation is not None:
            keys = {view: view if view in ("left", "right") else f"view.{view}" for view in self.views}
            augmented = self.augmentation({view: window[key] for view, key in keys.items()}, place)
            window |= {keys[view]: picture for view, picture in augmented.items()}
        if self.segmentation and (labels := pool.image_or_none(SEGMENTATION, index)) is not None:
            window["segmentation"] = labels
        if self.names and (objects := pool.objects(index)) is not None:
            window |= self._named(*objects, np.random.default_rng(window["seed"]))
        config = self.question_config
        if not self.depth_map_share and config.only is not None:
            return window | {"objective": config.only}  # nothing to draw: saves 5 % of the time
        rng = questions.window_generator(*place)
        carries_depth = rng.random() < self.depth_map_share
        possible = questions.possible_objectives(window)
        drawn = questions.draw_objectives(config, rng, [*possible, "depth"], self.questions_per_frame)
        depth = pool.image(DEPTH, index) if carries_depth or "depth" in drawn else None
        if carries_depth:
            window["depth"] = depth
            others = pool.further + (["right"] if pool.has_depth("right") else [])
            window |= {f"depth.{view}": pool.image_or_none(schema.depth_key(view), index) for view in others}
        asked = []
        for objective in drawn:
            question = {"objective": objective}
            if objective == "depth":
                segmentation = pool.image(SEGMENTATION, index) if config.depth_points == "interaction" else None
                found = questions.depth_points(depth, segmentation, window["points"][1], config, rng)
                if found is None:  # neither target nor gripper in view: ask something else of the mixture
                    others = questions.draw_objectives(config, rng, possible, 1)
                    question = {"objective": others[0]} if others else {}
                else:
                    question |= dict(zip(("points_px", "depths_m"), found, strict=True))
            asked.append(question)
        if not asked or not all(asked):
            return None
        for number, question in enumerate(asked[1:], start=1):
            question["seed"] = self._drawn_seed(*place, number)
        further = {"further": asked[1:]} if len(asked) > 1 else {}
        return window | asked[0] | further

    @staticmethod
    def _named(names: list[str], middles: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        texts = questions.called(names, rng)
        kept = [n for n, text in enumerate(texts) if text is not None and np.isfinite(middles[n]).all()]
        return {"names": [texts[n] for n in kept], "names_px": middles[kept]}

    @staticmethod
    def _drawn_seed(*place: int) -> int:
        """What is drawn for a window follows from it, and it from the place."""
        return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)
