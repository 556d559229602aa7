"""The report of a folder of results: plots, film, a page, every seed as JSON, and the numbers for the model card."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from stereovla.evaluation.episode_log import episodes_wanted, read_records, write_json
from stereovla.evaluation.metrics import success_rate
from stereovla.evaluation.options import LIBERO_EPISODES
from stereovla.evaluation.plots import plot_errors, plot_losses, plot_success, read_losses
from stereovla.evaluation.policies import SHOWN
from stereovla.evaluation.report_page import PAGE
from stereovla.evaluation.rollouts import RolloutConfig, film, summarise
from stereovla.evaluation.worlds import OSC_STEP_S, saved_config, saved_step_s
from stereovla.extras import extra
from stereovla.sources import InputError, check_checkpoint, fingerprint

with extra("report"):
    from jinja2 import Environment

FILM_TRIES = 3
SIDES_PX = (4, 6, 8, 12, 16, 24)  # of the narrowest side of targets, between which success is told
POLICIES = ("expert", "trained", "served", "untrained", "still")  # the order of the report
PICKED = "both fingers hold the named object at least 5 cm above where it rested"
PUT = "the named object, let go of, rests where it was to be put for 0.3 s"
ROLLOUTS = (
    "Rollouts run closed-loop in the simulator on seeds that no recorded episode uses; an episode succeeds when "
    "{criterion}. Intervals are Wilson's, 95 %."
)
LIBERO_ROLLOUTS = (
    "Rollouts run closed-loop in LIBERO from official initial states of its tasks, after 10 steps of waiting and for "
    "at most {limits} steps of 20 Hz, seen by a stereo pair at the agent view, camera range {ranges}; LIBERO's own "
    "check decides about success. Intervals are Wilson's, 95 %."
)
OFFLINE = "Errors are means over recorded episodes of the split {split}{held_out}."


def read_results(out: Path) -> dict[str, Any]:
    """{"options", "episodes": {policy: [record, ...]}, "missing": {policy: episodes that are not done yet}, "offline":
    ... or None}; InputError if `out` has no results.
    """
    episodes, options, missing = {}, {}, {}
    for name in POLICIES:
        folder = out / "rollouts" / name
        if records := read_records(folder / "episodes.jsonl"):
            options[name] = json.loads((folder / "options.json").read_text(encoding="utf-8"))
            episodes[name] = [records[seed] for seed in sorted(records)]
            missing[name] = max(0, episodes_wanted(folder) - len(records))
    offline = out / "offline.json"
    if not episodes and not offline.is_file():
        raise InputError(f"{str(out)!r} holds neither rollouts nor offline.json; run `rollout` or `offline` first")
    return {
        "options": options,
        "episodes": episodes,
        "missing": missing,
        "offline": json.loads(offline.read_text(encoding="utf-8")) if offline.is_file() else None,
    }


def by_task(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{policy: [{"task", "instruction", and what `success_rate` has}, ...]} of LIBERO's tasks; empty for others."""
    found: dict[str, list[dict[str, Any]]] = {}
    for policy, records in results["episodes"].items():
        for task in sorted({record["task"] for record in records if "task" in record}):
            of_task = [record for record in records if record["task"] == task]
            numbers = success_rate([record["success"] for record in of_task])
            found.setdefault(policy, []).append({"task": task, "instruction": of_task[0]["instruction"], **numbers})
    return found


def by_size(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{policy: [{"low", "high", and what `success_rate` has}, ...]} by the target's narrowest side in the left view,
    px; empty where the records, LIBERO's or old ones, do not say it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for policy, records in results["episodes"].items():
        sides = [(record["target_side_px"], record["success"]) for record in records if "target_side_px" in record]
        for low, high in pairwise((0, *SIDES_PX, None)):
            of_size = [success for side, success in sides if low <= side and (high is None or side < high)]
            if of_size:
                found.setdefault(policy, []).append({"low": low, "high": high, **success_rate(of_size)})
    return found


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def libero_steps(saved: dict[str, Any]) -> int:
    """Most steps of an episode as LIBERO counts them, at 20 Hz whatever a policy's are."""
    return round(saved["max_steps"] * saved_step_s(saved) / OSC_STEP_S)


def method_of(results: dict[str, Any]) -> str:
    """How results were measured, in words."""
    options, parts = results["options"].values(), []
    if there := [saved for saved in options if "world.suite" in saved]:
        limits, ranges = {libero_steps(saved) for saved in there}, {saved["world.camera_range"] for saved in there}
        steps = " or ".join(map(str, sorted(limits)))
        parts.append(LIBERO_ROLLOUTS.format(limits=steps, ranges=" or ".join(sorted(ranges))))
    elif options:
        kinds = {kind for saved in options for kind in tasks_of(saved)}
        criteria = [PICKED] * ("pick" in kinds) + [PUT] * bool(kinds - {"pick"})
        parts.append(ROLLOUTS.format(criterion=", or of what is put somewhere when ".join(criteria)))
    if results["offline"]:
        split = results["offline"]["options"]["split"]
        held_out = "" if split == "train" else ", which training never reads"
        parts.append(OFFLINE.format(split=split, held_out=held_out))
    return " ".join(parts)


def tasks_of(saved: dict[str, Any]) -> list[str]:
    """Kinds of tasks in a world of ours; results from before it had several do not say."""
    return saved.get("world.tasks", ["pick"])


def title_of(options: dict[str, dict[str, Any]]) -> str:
    """Of the picture of success rates."""
    if any("world.suite" in saved for saved in options.values()):
        return "LIBERO's own check"
    if {kind for saved in options.values() for kind in tasks_of(saved)} == {"pick"}:
        return "The right object, lifted at least 5 cm"
    return "The right object, picked up, or put where it was to be put"


def success_metrics(results: dict[str, Any], summaries: dict[str, Any]) -> list[dict[str, Any]]:
    """The trained policy's success rate as the model card wants it, the others' beside it in its text; none before all
    its episodes are done, of which those that take longest, the failures, come last.
    """
    options = results["options"]
    if "trained" not in summaries or results["missing"]["trained"]:
        return []
    numbers = summaries["trained"]
    text = f"{percent(numbers['success_rate'])} of {numbers['episodes']} seeds (95 % interval "
    text += f"{percent(numbers['interval_low'])} to {percent(numbers['interval_high'])})"
    for name in ("expert", "untrained"):
        if name in summaries and not results["missing"][name]:
            label = "scripted expert" if name == "expert" else "the same model untrained"
            text += f"; {label}: {percent(summaries[name]['success_rate'])} of {summaries[name]['episodes']}"
    saved = options["trained"]
    if suite := saved.get("world.suite"):
        tasks = saved["world.tasks"]
        where = (
            f"{suite}, task{'s' * (len(tasks) > 1)} {', '.join(map(str, tasks))}, {numbers['episodes']} of "
            f"{LIBERO_EPISODES * len(tasks)} initial states, camera range {saved['world.camera_range']}, at most "
            f"{libero_steps(saved)} steps of 20 Hz"
        )
        task = "tasks of LIBERO"
    else:
        robot = saved.get("world.robot", "panda").capitalize()  # results from before there were others do not say
        where = f"simulated {robot} at a table, unseen seeds, camera range {saved['world.camera_range']}"
        task = f"{', '.join(tasks_of(saved))} objects that an instruction names"
    where += told_otherwise(saved)
    return [metric("success rate", "success_rate", numbers["success_rate"], text, where, task)]


def told_otherwise(saved: dict[str, Any]) -> str:
    """What a policy was told that is not so, in words; "" of nothing."""
    words = ""
    if (shown := saved.get("shown", "given")) != "given":
        words += f", its geometry shown {SHOWN[shown]}"
    if degrees := saved.get("calibration_error_deg"):
        words += f", told a camera turned by {degrees:g} degrees"
    return words


def metric(
    name: str, kind: str, value: float, text: str, where: str, task: str = "actions and answers of recorded frames"
) -> dict[str, Any]:
    """One number of the model card."""
    return {"task": task, "dataset": where, "name": name, "type": kind, "value": value, "text": text}


def offline_metrics(offline: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors on held-out rows as the model card wants them, with what they compare to."""
    split = offline["options"]["split"]
    where = f"{offline['rows']} {'frames that it was trained on' if split == 'train' else 'held-out frames'}"
    action, depth, box, pose = (offline[name] for name in ("action", "depth", "box", "keyframe"))
    rows: list[tuple[str, str, dict[str, float] | float | None, str]] = []
    if action["still_mm"]:
        note = f"; an arm that stays still: {action['still_mm']['mean']:.2f} mm"
        rows.append(("action error, position of a step", "mm", action["position_mm"], note))
        rows.append(("action error, rotation of a step", "deg", action["rotation_deg"], ""))
    for place in ("target", "gripper"):
        if depth[f"{place}_constant_cm"]:
            note = f"; best constant answer: {depth[f'{place}_constant_cm']['mean']:.2f} cm"
            rows.append((f"depth answer error at the {place}", "cm", depth[f"{place}_cm"], note))
    rows.append(("depth answers that are no number", "share", depth["unparsable"], ""))
    for side in ("left", "right"):
        rows.append((f"box IoU of the target, {side} view", "", box[f"{side}_iou"], ""))
    rows.append(("box answers that are no box", "share", box["invalid"], ""))
    rows.append(("keyframe pose error, horizontal", "cm", pose["xy_cm"], ""))
    rows.append(("keyframe pose error, vertical", "cm", pose["z_cm"], ""))
    rows.append(("keyframe answers that are no pose", "share", pose["invalid"], ""))
    rows.append(("disparity error", "px", offline["disparity"]["error_px"], ""))
    metrics = []
    for name, unit, numbers, note in rows:
        kind = "_".join(f"{name} {unit}".replace(",", "").lower().split())
        if isinstance(numbers, float):
            metrics.append(metric(name, kind, numbers, percent(numbers), where))
        elif numbers is not None:  # None: nothing was asked, or no answer could be read, which the shares say
            space = f" {unit}" if unit else ""
            text = f"mean {numbers['mean']:.2f}{space}, median {numbers['median']:.2f}{space}{note}"
            metrics.append(metric(name, kind, numbers["mean"], text, where))
    # not in results from before there were controls
    return metrics + geometry_metrics(offline.get("geometry"), where)


def geometry_metrics(found: dict[str, Any] | None, where: str) -> list[dict[str, Any]]:
    """Errors of a policy whose geometry is shown what there is, with those where it is shown others."""
    if found is None:
        return []
    errors = {
        f"depth of the {view} view, {name}": (name, {shown: of["depth_map"][view] for shown, of in found.items()})
        for view in found["given"].get("depth_map", ())
        for name in ("abs_rel", "rmse_m", "delta_1_25", "l_si")
    }
    errors |= {
        f"{part} error with its geometry, {name}": ("mean", {shown: of[part][name] for shown, of in found.items()})
        for part, name in (("action", "position_mm"), ("keyframe", "xy_cm"), ("keyframe", "z_cm"))
    }
    metrics = []
    for title, (key, numbers) in errors.items():
        values = {shown: None if of is None else of[key] for shown, of in numbers.items()}
        if values["given"] is None:
            continue
        notes = [
            f"; shown {what}: {values[shown]:.3f}"
            for shown, what in SHOWN.items()
            if shown != "given" and values.get(shown) is not None
        ]
        kind = "_".join(title.replace(",", "").lower().split())
        metrics.append(metric(title, kind, values["given"], f"{values['given']:.3f}{''.join(notes)}", where))
    return metrics


def film_episode(out: Path, results: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """Films one episode of the trained policy into rollout.gif; None without rollouts of a trained policy.

    Args:
        seed: of the episode; -1 takes the first success, or the episode that got furthest. On a film the model acts
            alone, not in the batch of the rollouts; where the rounding costs the success, the next one is filmed.
    """
    from stereovla.evaluation.film import write_gif
    from stereovla.evaluation.policy_specs import make_policy

    records = results["episodes"].get("trained")
    if not records:
        return None
    saved = results["options"]["trained"]
    successes = [record["seed"] for record in records if record["success"]]
    furthest = max(records, key=lambda record: record["progress"])["seed"]
    seeds = [seed] if seed >= 0 else successes[:FILM_TRIES] or [furthest]
    run = json.loads((out / "rollouts/trained/run.json").read_text(encoding="utf-8"))
    spec = run["policy"]
    wanted = {"weights": saved["weights"], "seeds": seeds}
    report = out / "report.json"
    if (out / "rollout.gif").is_file() and report.is_file():
        if json.loads(report.read_text(encoding="utf-8"))["film"] == wanted:
            return wanted
    check_checkpoint(spec)
    if fingerprint(spec) != saved["weights"]:
        raise InputError(
            f"{spec!r} has other weights than those that were rolled out; roll out again with --restart True"
        )
    shown = saved.get("shown", "given")
    how = (saved["execution_horizon"], saved["max_steps"], saved["calibration_error_deg"], shown)
    config = RolloutConfig(saved_config(saved), *how)
    # of the revision that was rolled out: an adapter's weights are those of its model too
    own = {"num_steps": saved["num_steps"] or None, "run_code": run.get("run_code", False), "shown": shown}
    policy = make_policy(spec, **own)
    for number in seeds:
        observations, record = film(policy, number, config)
        if record["success"]:
            break
    disparities = policy.disparity(observations)
    write_gif(out / "rollout.gif", observations, disparities, record["success"], saved_step_s(saved))
    return wanted


def write_report(out: Path, training: Path | None, with_film: bool = True, film_seed: int = -1) -> Path:
    """Writes the pictures, rollout.gif, metrics.json, report.json and report.html into `out`; returns the page."""
    results = read_results(out)
    summaries = {name: summarise(records) for name, records in results["episodes"].items()}
    method = method_of(results)
    for name, count in results["missing"].items():
        if count:
            print(f"{name}: {count} episodes are not done yet; until then its rate is not for the model card")
    images = []
    filmed = film_episode(out, results, film_seed) if with_film else None
    if filmed:
        images.append("rollout.gif")
    if summaries:
        plot_success(summaries, out / "success.png", title_of(results["options"]))
        images.append("success.png")
    if training is not None:
        if not (training / "losses.jsonl").is_file():
            raise InputError(f"{str(training)!r} has no losses.jsonl; give the --output_dir of train.py")
        plot_losses(read_losses(training / "losses.jsonl"), out / "losses.png")
        images.append("losses.png")
    metrics = success_metrics(results, summaries)
    if results["offline"]:
        plot_errors(results["offline"]["histograms"], out / "errors.png")
        images.append("errors.png")
        metrics += offline_metrics(results["offline"])
    write_json(out / "metrics.json", {"metrics": metrics, "images": images, "method": method})
    write_json(out / "report.json", {**results, "summaries": summaries, "metrics": metrics, "film": filmed})
    page = out / "report.html"
    html = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(
        html.render(
            metrics=metrics,
            images=images,
            summaries=summaries,
            method=method,
            by_task=by_task(results),
            by_size=by_size(results),
            step_s={policy: saved_step_s(saved) for policy, saved in results["options"].items()},
            **results,
        ),
        encoding="utf-8",
    )
    os.replace(temporary, page)
    return page
