"""What a training asks of its data: as it is wished on the command line, or else what the data has.

Recorded demonstrations of the simulator have everything; those of a robot often have neither depth nor boxes, no
held-out split, or one camera without a calibration. What is not wished for follows from the data; a wish that it
cannot meet is an error, and so are data without a view that the model needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from stereovla.dataset_builder.dataset.schema import BASELINE, CALIBRATION, OTHER_NAMES, RIGHT, for_whom, views_of
from stereovla.dataset_builder.streaming.episodes import EpisodeSource
from stereovla.dataset_builder.streaming.mixture import Mixture, check_mixture
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.dataset_builder.streaming.windows import DEPTH, SEGMENTATION
from stereovla.training.options import mixture_weights

BOXES = ("target.box_left_px", "target.box_right_px")
NAMED = (OTHER_NAMES, SEGMENTATION)  # what objects are called, and where they are
# columns that an objective is learned from; an action is learned together with the keyframe that it leads to, and boxes
# of the right view are learned where the model sees one
LEARNED_FROM = {
    "action": ("keyframe_pose",),
    "depth": (DEPTH,),
    "box": BOXES,
    "pose": ("keyframe_pose",),
    "camera": (RIGHT, *CALIBRATION),
}
STEREO = ("left", "right")  # views of a model that sees pairs
HELD_OUT = "validation"


@dataclass(frozen=True)
class Contents:
    """What each of several datasets has: names of its splits, and columns that hold anything."""

    splits: Mapping[str, Sequence[str]]
    columns: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, datasets: str | Path | Mixture, skip: bool = False) -> "Contents":
        """Read from the first training shard of each; with `skip`, the first one that can be read."""
        sources = {str(name): EpisodeSource(name, "train", skip=skip) for name, _ in check_mixture(datasets)}
        return cls(
            {name: source.splits for name, source in sources.items()},
            {name: source.filled for name, source in sources.items()},
        )

    def lacking(self, *columns: str) -> str:
        """Names of the datasets without one of these columns; "" = all have them."""
        return ", ".join(name for name, present in self.columns.items() if not present.issuperset(columns))

    def check_views(self, views: Sequence[str]) -> None:
        """ValueError for datasets without the right view where a model needs it, and for views that none has."""
        there = {name: views_of(present) for name, present in self.columns.items()}
        lacking = [name for name, found in there.items() if "right" in views and "right" not in found]
        if lacking:
            raise ValueError(
                f"{', '.join(lacking)} has no right view, which this model needs; {for_whom(there[lacking[0]])}"
            )
        if unknown := [view for view in views if not any(view in found for found in there.values())]:
            found = "; ".join(f"{name} has {', '.join(found)}" for name, found in there.items())
            raise ValueError(f"no dataset has the view {', '.join(unknown)}, which this model sees: {found}")

    def without_split(self, split: str) -> str:
        """Names of the datasets without a split."""
        return ", ".join(name for name, splits in self.splits.items() if split not in splits)


@dataclass(frozen=True)
class Questions:
    """Shares of the objectives, as in --mixture, where depth is asked, and the views that the model sees."""

    shares: Mapping[str, float]
    depth_points: str
    views: Sequence[str] = STEREO

    @property
    def text(self) -> str:
        """The shares as they are written and what they are of: "5:0:0:1 (action : depth : box : pose)"."""
        names = [name for name in self.shares if self.shares[name] or name != "camera"]
        return f"{':'.join(f'{self.shares[name]:g}' for name in names)} ({' : '.join(names)})"

    def windows(self, config: Any) -> dict[str, Any]:
        """Keywords of `WindowStream` for a model of this config; no sample carries a depth map."""
        return {
            "mixture": dict(self.shares),
            "depth_points": self.depth_points,
            "chunk_size": config.chunk_size,
            "history": config.state_history,
            "depth_map_share": 0.0,
            "views": tuple(self.views),
        }


def questions(
    data: Contents,
    wish: str | None,
    default: str,
    depth_points: str | None,
    objectives: Sequence[str] = tuple(LEARNED_FROM),
    optional: int = 1,
    views: Sequence[str] = STEREO,
    writes_pose: bool = True,
) -> Questions:
    """Mixture and place of the depth questions; ValueError for a wish that the data cannot meet, and for data of which
    nothing can be asked.

    Args:
        wish: --mixture, or None for what the data has of `default`.
        depth_points: --depth_points, or None for "interaction" where the data has masks, else "uniform".
        objectives, optional: as in `mixture_weights`.
        views: that the model sees. writes_pose: whether it learns the keyframe with the action.
    """
    data.check_views(views)
    sides = [column for column in BOXES if "right" in views or "left" in column]
    needed = LEARNED_FROM | {"box": tuple(sides)} | ({} if writes_pose else {"action": ()})
    shares = mixture_weights(default if wish is None else wish, objectives, optional)
    if depth_points is None:
        depth_points = "uniform" if data.lacking(SEGMENTATION) else "interaction"
    elif depth_points != "off" and (lacking := data.lacking(*needed_by(depth_points))):
        raise ValueError(
            f"--depth_points {depth_points} needs {' and '.join(needed_by(depth_points))}, which {lacking} lacks; "
            "leave the option out"
        )
    asked = [name for name, share in shares.items() if share and not (name == "depth" and depth_points == "off")]
    blind = () if "right" in views else ("camera",)  # what only a model that sees pairs can be asked
    possible = [name for name in objectives if name not in blind and not data.lacking(*needed[name])]
    impossible = [name for name in asked if name not in possible]
    if wish is not None and impossible:
        reasons = [
            f"{name} (this model sees no right view)"
            if name in blind
            else f"{name} ({data.lacking(*needed[name])} lacks {', '.join(needed[name])})"
            for name in impossible
        ]
        raise ValueError(
            f"--mixture {wish} asks for {', '.join(reasons)}; of this data can be asked: "
            f"{', '.join(possible) or 'nothing'}; without --mixture what can be asked is"
        )
    if len(impossible) == len(asked):
        raise ValueError(
            f"none of {', '.join(asked)} can be learned: the data has nothing of "
            f"{', '.join(sorted({column for name in asked for column in needed[name]}))}"
        )
    return Questions(
        {name: 0.0 if name in impossible else share for name, share in shares.items()}, depth_points, views
    )


def needed_by(depth_points: str) -> tuple[str, ...]:
    return (DEPTH, SEGMENTATION) if depth_points == "interaction" else (DEPTH,)


def depth_map_share(
    data: Contents,
    wish: float | None,
    default: float,
    weight: float,
    calibrated: bool = True,
    shown: bool = False,
) -> float:
    """Share of the samples that carry a depth map for a disparity or depth loss of this weight; ValueError for a wish
    that model or data cannot meet.

    Args:
        calibrated: whether the loss needs a calibration, as disparity does.
        shown: whether the model is shown the depth, so that every sample needs one.
    """
    columns = (DEPTH, *CALIBRATION) if calibrated else (DEPTH,)
    lacking = data.lacking(*columns)
    if shown:
        if lacking or wish not in (None, 1):
            reason = f"{lacking} lacks {DEPTH}" if lacking else f"--depth_map_share is {wish:g}"
            raise ValueError(f"this model is shown depth in place of pictures, on every sample; {reason}")
        return 1.0
    if wish and not weight:
        raise ValueError(
            f"--depth_map_share is {wish:g}, but this model learns from no depth map (disparity_loss_weight or "
            "depth_map_loss_weight of its config is 0); leave the option out"
        )
    if wish and lacking:
        raise ValueError(
            f"--depth_map_share is {wish:g}, but {lacking} lacks one of {', '.join(columns)}; leave the option out"
        )
    if wish is not None:
        return wish
    return default if weight and not lacking else 0.0


def held_out_batches(data: Contents, wish: int | None, default: int) -> int:
    """How many held-out batches are scored at a checkpoint; ValueError for a wish without held-out data."""
    if wish is not None and wish < 0:
        raise ValueError(f"--validation_batches is {wish}; it must be at least 0")
    lacking = data.without_split(HELD_OUT)
    if wish and lacking:
        there = ", ".join(dict.fromkeys(split for splits in data.splits.values() for split in splits))
        raise ValueError(
            f"--validation_batches is {wish}, but {lacking} has no split {HELD_OUT!r}; it has: {there}. Leave the "
            "option out to train without"
        )
    return wish if wish is not None else 0 if lacking else default


def batches_in_words(count: int) -> str:
    return f"{count} held-out batch{'es' if count > 1 else ''}" if count else ""


def frames_in_words(frames: int, stream: WindowStream) -> str:
    """Of how many frames the windows of a stream were taken, by all processes of the training, which all call this; and
    which shards it could not read, where it was to go on without them.
    """
    unread = {shard: rows for part in gather_object([stream.unread_shards]) for shard, rows in part.items()}
    if not unread:
        return f"{frames:,} frames"
    names = ", ".join(f"{Path(shard).name} ({rows:,} frames)" for shard, rows in sorted(unread.items()))
    return f"at least {frames - sum(unread.values()):,} of {frames:,} frames, without all or part of {names}"


def questions_per_frame(wish: int | None, usual: int, asked: Questions, part_size: int, stereovla: bool) -> int:
    """How many samples share pictures; ValueError for a wish that cannot be.

    Args:
        usual: without a wish, where that can be.
        part_size: samples of a process at once.
    """
    if wish is None:
        asks_one_thing = sum(share > 0 for share in asked.shares.values()) == 1
        return 1 if asks_one_thing or not stereovla or part_size % usual else usual
    if wish > 1 and not stereovla:
        raise ValueError(
            f"--questions_per_frame is {wish}, but a DepthVLA reads its pictures together with the question, so that "
            "questions cannot share them; it must be 1"
        )
    if part_size % wish:
        raise ValueError(
            f"--questions_per_frame is {wish}; it must divide the {part_size} samples that a process takes at once "
            "(--batch_size over processes and --accumulation)"
        )
    return wish


def terms(
    data: Contents,
    asked: Questions,
    held_out: str,
    depth: float | None = None,
    learned: str = "disparity",
    named: bool = False,
) -> str:
    """One line: what the data lacks, and what is therefore asked.

    Args:
        held_out: what is scored at a checkpoint, "" = nothing.
        depth: share of the samples that carry a depth map; None = this training asks for none.
        learned: what is learned from it.
        named: whether this training learns what objects are called.
    """
    kinds = {
        "right view": (RIGHT,),
        "calibration": tuple(column for column in CALIBRATION if column != BASELINE),
        "depth": (DEPTH,),
        "boxes": BOXES[:1],
        "masks": (SEGMENTATION,),
        "keyframes": ("keyframe_pose",),
        **({"names of objects": NAMED} if named else {}),
    }
    lacking = {kind: names for kind, columns in kinds.items() if (names := data.lacking(*columns))}
    if names := data.without_split(HELD_OUT):
        lacking["held-out split"] = names
    grouped: dict[str, list[str]] = {}
    for kind, names in lacking.items():
        grouped.setdefault(names, []).append(kind)
    has_not = "; ".join(f"{names} has no {', no '.join(kinds)}" for names, kinds in grouped.items())
    parts = [f"mixture {asked.text}"]
    if asked.shares.get("depth"):
        parts.append(f"depth points {asked.depth_points}")
    if depth is not None:
        parts.append(f"{learned} on {100 * depth:g} % of the samples" if depth else f"no {learned}")
    parts.append(f"{held_out} scored at each checkpoint" if held_out else "nothing held out to score")
    return f"{has_not + ': ' if has_not else ''}{', '.join(parts)}"
