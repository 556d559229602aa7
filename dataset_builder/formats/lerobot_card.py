"""The card of a LeRobot dataset that we exported."""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.card_edits import update_card
from stereovla.dataset_builder.formats.lerobot_metadata import INFO
from stereovla.untrusted import read_yaml

RIG = "meta/rig.yaml"
_SOURCE = "path/or/hub-id"


def write_card(
    folder: Path, license: str | None = None, repo_id: str | None = None, published: str | None = None
) -> Path:
    """Writes README.md from meta/info.json; returns its path. What a person wrote around the generated part stays.

    Args:
        license: identifier of the Hub; None = that of meta/rig.yaml. ValueError where that is another.
        repo_id: id on the Hub, for the example of its use.
        published: the card on the Hub, see `update_card`.
    """
    info, features = (content := shards.read_json(folder / INFO)), content["features"]
    if (folder / RIG).is_file():
        rig = read_yaml((folder / RIG).read_text(encoding="utf-8"), RIG)
        known = rig.get("license") if isinstance(rig, dict) else None
        if not isinstance(known, str):
            raise ValueError(f"{folder / RIG} names no license; say it there, such as license: mit")
        if license not in (None, known):
            raise ValueError(f"the license is {license!r}; {folder / RIG} says {known!r}: change one of them")
        license = known
    depth = [key for key, feature in features.items() if (feature.get("info") or {}).get("is_depth_map")]
    data = DatasetCardData(
        license=license,
        task_categories=["robotics"],
        tags=["LeRobot", "robotics", *(["stereo"] if schema.RIGHT in features else []), *(["depth"] if depth else [])],
        pretty_name=f"{info['robot_type']} demonstrations in LeRobot's format",
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    text = _text(info, license, depth).replace(_SOURCE, repo_id or _SOURCE)
    return update_card(folder / "README.md", data.to_dict(), text, published, DatasetCard)


def _text(info: dict[str, Any], license: str, depth: list[str]) -> str:
    rows = []
    for key, feature in info["features"].items():
        shape, names = " x ".join(map(str, feature.get("shape") or ())), feature.get("names")
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)  # LeRobot's may be nested
        rows.append(f"| {key} | {feature['dtype']} | {shape} | {', '.join(names) if named else ''} |")
    splits = [f"- {name}: episodes {numbers}" for name, numbers in info["splits"].items()]
    pair = "\nThe views left and right are a rectified stereo pair." if schema.RIGHT in info["features"] else ""
    calibrated = any(key.startswith("calibration.") for key in info["features"])
    camera = " Each frame has the calibration of its cameras (`calibration.*`)." if calibrated else ""
    of_depth = f"\n\nDepth ({', '.join(depth)}) is float32 in m, 0 = unknown." if depth else ""
    return f"""# {info["robot_type"]}: demonstrations in LeRobot's format

{info["total_frames"]} frames in {info["total_episodes"]} episodes at {info["fps"]} Hz, with {info["total_tasks"]}
different instructions, in LeRobot's format {info["codebase_version"]}.{pair}{camera}{of_depth}

| column | type | shape | numbers |
| --- | --- | --- | --- |
{chr(10).join(rows)}

{chr(10).join(splits)}

## Use

```python
from lerobot.datasets import LeRobotDataset

dataset = LeRobotDataset("{_SOURCE}")
```

`stereovla data import lerobot --source {_SOURCE} --config meta/rig.yaml` reads it as a dataset of StereoVLA again.

## Licence

{license}.
"""
