"""The table of a comparison, from what its folder holds: results.json and table.md."""

import json
import platform
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from stereovla.evaluation.episode_log import episodes_wanted, read_records, write_json
from stereovla.evaluation.metrics import success_rate
from stereovla.evaluation.policies import SHOWN

NO_ENTRY = {"expert": "the scripted expert, which looks into the world", "still": "an arm that never moves"}
HEAD = ("policy", "it sees", "M parameters", "succeeded (95 %, of these trainings)", "by training")
HEAD += ("keyframe xy, z, median cm", "action, mean mm", "depth")
HEAD += ("in the controls: succeeded; keyframe xy, z; action", "core h of training")


def write_table(out: Path, entries: Mapping[str, Any]) -> Path:
    """Writes both, of the policies that have any result; returns the path of the table.

    Args:
        entries: of `comparison_policies`, in the order of the rows.
    """
    names = [name for name in (*NO_ENTRY, *entries) if (out / name).is_dir()]
    results = {name: result_of(out / name) for name in names}
    options = json.loads((out / "comparison.json").read_text())
    write_json(out / "results.json", {"options": options, "machine": machine(), "policies": results})
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name, result in results.items():
        sees = NO_ENTRY[name] if name in NO_ENTRY else entries[name].sees
        lines.append("| " + " | ".join([name, sees, *cells(result)]) + " |")
    given = ", ".join(f"{name} {value}" for name, value in options.items() if value not in (None, "{}"))
    path, temporary = out / "table.md", out / "table.md.tmp"
    temporary.write_text("\n".join([*lines, "", f"{given}. {machine()}.", ""]))
    temporary.replace(path)
    return path


def machine() -> str:
    """What the numbers of cost were measured on."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [
            line.partition(":")[2] for line in information.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0].strip() if models else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}{gpu}; torch {torch.__version__}, transformers {transformers.__version__}"


def result_of(folder: Path) -> dict[str, Any]:
    """{"parameters", "success": {shown: rate with interval}, "by_seed": [successes of "given"], "as_given": {shown:
    successes of "given" in the same episodes}, "missing": {shown: episodes that are not done yet}, "offline": [of each
    seed], "core_seconds", "seconds": {stage: sum over the seeds}} of one policy.
    """
    runs = sorted(folder.glob("seed-*"), key=lambda path: int(path.name.partition("-")[2])) or [folder]
    episodes: dict[str, list[bool]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    core_seconds: dict[str, float] = defaultdict(float)
    by_seed, offline = [], []
    missing: dict[str, int] = defaultdict(int)
    as_given: dict[str, int] = defaultdict(int)
    for run in runs:
        given = {record["seed"]: record["success"] for record in episodes_of(run / "given")}
        for shown in SHOWN:
            records = episodes_of(run / shown)
            found = [record["success"] for record in records]
            episodes[shown] += found
            as_given[shown] += sum(given.get(record["seed"], False) for record in records)
            missing[shown] += max(0, sum(map(episodes_wanted, (run / shown).glob("rollouts/*"))) - len(found))
            if shown == "given" and found:
                by_seed.append(sum(found))
        costs = (run / "costs.jsonl").read_text() if (run / "costs.jsonl").is_file() else ""
        for cost in (json.loads(line) for line in costs.splitlines(True) if line.endswith("\n")):
            seconds[cost["stage"]] += cost["seconds"]
            core_seconds[cost["stage"]] += cost["core_seconds"]
        if (run / "offline/offline.json").is_file():
            offline.append(json.loads((run / "offline/offline.json").read_text()))
    weights = next(folder.glob("seed-*/training/model/model.safetensors"), None)
    return {
        "parameters": None if weights is None else parameters_in(weights),
        "success": {shown: success_rate(found) for shown, found in episodes.items() if found},
        "by_seed": by_seed,
        "as_given": {shown: count for shown, count in as_given.items() if shown != "given" and episodes[shown]},
        "missing": {shown: count for shown, count in missing.items() if count},
        "offline": offline,
        "seconds": dict(seconds),
        "core_seconds": dict(core_seconds),
    }


def episodes_of(folder: Path) -> list[dict[str, Any]]:
    """Records of the one policy whose rollouts are in `folder`; none where there are none."""
    return [record for path in folder.glob("rollouts/*/episodes.jsonl") for record in read_records(path).values()]


def parameters_in(weights: Path) -> int:
    with safe_open(weights, "np") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]
    return sum(torch.Size(size).numel() for size in sizes)


def cells(result: dict[str, Any]) -> list[str]:
    """All but the first two of a row."""
    offline, success = result["offline"], result["success"]
    keyframe = spot([of["pointed_keyframe"] for of in offline])
    depth = [of["disparity"]["error_px"] for of in offline if of["disparity"]["error_px"]]
    maps = [of["geometry"]["given"]["depth_map"]["left"] for of in offline if "depth_map" in given_geometry(of)]
    depths = []
    if depth:
        depths.append(f"disparity {mean([one['median'] for one in depth]):.2f} px, median")
    if maps and None not in maps:
        depths.append(f"depth {mean([one['abs_rel'] for one in maps]):.3f} of it, mean")
    controls = [control(shown, result) for shown in SHOWN if shown != "given"]
    hours = result["core_seconds"].get("train")
    return [
        "" if result["parameters"] is None else f"{result['parameters'] / 1e6:.2f}",
        "" if "given" not in success else rate(success["given"]) + unfinished(result, "given"),
        ", ".join(map(str, result["by_seed"])) if len(result["by_seed"]) > 1 else "",
        keyframe,
        action([of["action"] for of in offline]),
        "; ".join(depths),
        ". ".join(filter(None, controls)),
        "" if hours is None else f"{hours / 3600:.2f}",
    ]


def control(shown: str, result: dict[str, Any]) -> str:
    """What a control gave, in words; "" where it was not run."""
    found = [of["geometry"][shown] for of in result["offline"] if of["geometry"] and shown in of["geometry"]]
    parts = []
    if shown in result["success"]:
        told = rate(result["success"][shown]) + unfinished(result, shown)
        parts.append(f"{told}, as it is {result['as_given'][shown]} of these")
    parts += filter(None, [spot([of["keyframe"] for of in found]), action([of["action"] for of in found])])
    return f"{SHOWN[shown]}: {'; '.join(parts)}" if parts else ""


def given_geometry(offline: dict[str, Any]) -> dict[str, Any]:
    return (offline["geometry"] or {"given": {}})["given"]


def rate(numbers: dict[str, float]) -> str:
    low, high = (100 * numbers[f"interval_{end}"] for end in ("low", "high"))
    return f"{numbers['successes']} of {numbers['episodes']} ({low:.0f} to {high:.0f} %)"


def unfinished(result: dict[str, Any], shown: str) -> str:
    """Said of a rate that is still too high: failures take longest."""
    count = result["missing"].get(shown)
    return f", {count} still to do" if count else ""


def spot(errors: list[dict[str, Any]]) -> str:
    """Median errors of a position in the plane and in height, means over the seeds; "" where none was told."""
    known = [of for of in errors if of["xy_cm"] and of["z_cm"]]
    return ", ".join(f"{mean([of[name]['median'] for of in known]):.2f}" for name in ("xy_cm", "z_cm")) if known else ""


def action(errors: list[dict[str, Any]]) -> str:
    known = [of["position_mm"]["mean"] for of in errors if of["position_mm"]]
    return f"{mean(known):.1f} mm" if known else ""


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
