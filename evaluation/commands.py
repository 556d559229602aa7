"""What the commands of `stereovla evaluate` do; each goes on where an interrupted one stopped."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stereovla.evaluation.episode_log import EpisodeLog, write_json
from stereovla.evaluation.options import (
    DelayOptions,
    InsideOptions,
    LiberoOptions,
    OfflineOptions,
    ReportOptions,
    RolloutOptions,
    SimulatorOptions,
)
from stereovla.evaluation.policy_specs import check_shown, make_policy, policy_identity
from stereovla.sources import InputError, check_checkpoint, fingerprint, load_checkpoint


def rollout(options: RolloutOptions) -> None:
    """Rolls out every policy and prints its success rate."""
    from stereovla.evaluation.rollouts import RolloutConfig

    how = (options.execution_horizon, options.max_steps, options.calibration_error_deg, options.shown)
    config = RolloutConfig(_world(options), *how)

    def seeds(kind: str) -> range:
        count = options.seeds if kind in ("trained", "served") else options.baseline_seeds
        return range(options.first_seed, options.first_seed + count)

    _roll_out_all(options, config, seeds, max(8, options.execution_horizon))


def libero(options: LiberoOptions) -> None:
    """Rolls out every policy in LIBERO and prints its success rate, of the suite and of each task."""
    from stereovla.evaluation.rollouts import RolloutConfig, summarise
    from stereovla.simulation.libero import LiberoConfig
    from stereovla.simulation.libero.robot import SUBSTEPS
    from stereovla.simulation.libero.suites import INITIAL_STATES, placing_tasks, step_limit, suite_tasks

    names = ("suite", "camera_range", "image_size", "baseline_m", "wrist", "control")
    try:
        world = LiberoConfig(tasks=tuple(options.tasks), **{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise InputError(str(error)) from error
    able = placing_tasks(options.suite)
    if "expert" in options.specs() and not set(world.tasks) <= set(able):
        raise InputError(
            f"--policies has the expert, which only picks up and places; of {options.suite} it can do the tasks "
            f"{', '.join(map(str, able)) or 'none'}: name them with --tasks"
        )
    official = step_limit(options.suite)
    limit = options.max_steps or official
    if options.control == "pose":
        limit = -(-limit // SUBSTEPS)
    seeds = [task * INITIAL_STATES + state for task in world.tasks for state in range(options.episodes)]
    config = RolloutConfig(world, options.execution_horizon, limit, shown=options.shown)
    found = _roll_out_all(options, config, lambda kind: seeds, options.execution_horizon)
    for kind, records in found.items():
        for task in world.tasks:
            of_task = summarise([record for record in records if record["task"] == task])
            words = suite_tasks(options.suite)[task].instruction
            print(f"{kind}, task {task}: {of_task['successes']} of {of_task['episodes']}: {words}")
    total = len(suite_tasks(options.suite))
    said = (len(world.tasks), options.episodes, options.max_steps or official, options.camera_range)
    if said != (total, INITIAL_STATES, official, "stock"):
        print(
            f"This is not the official protocol: {said[0]} of {total} tasks, {said[1]} of {INITIAL_STATES} initial "
            f"states of a task, {said[2]} of {official} steps, camera range {said[3]}."
        )


def _roll_out_all(
    options: Any, config: Any, seeds: Callable[[str], Sequence[int]], chunk_size: int
) -> dict[str, list[dict[str, Any]]]:
    """Rolls out every policy of `options.specs()` on the seeds for its kind, each into its own log, and prints its
    success rate; {kind: records}.
    """
    from stereovla.evaluation.rollouts import config_json, summarise
    from stereovla.evaluation.workers import roll_out

    identities = {
        spec: policy_identity(spec, options.run_code, options.keys) for spec in options.specs()
    }  # a bad one ends all before an hour has passed
    for spec in identities:
        check_shown(spec, options.shown)
    names = [identity["kind"] for identity in identities.values()]
    if len(set(names)) < len(names):
        raise InputError(f"--policies holds several of one kind ({', '.join(names)}); give each its own --out")
    out, found = Path(options.out), {}
    out.mkdir(parents=True, exist_ok=True)
    for spec, identity in identities.items():
        saved = {**config_json(config), **identity, "num_steps": options.num_steps}
        log = EpisodeLog(out / "rollouts" / identity["kind"], saved, options.restart)
        source = str(Path(spec).resolve()) if Path(spec).is_dir() else spec
        wanted = seeds(identity["kind"])
        write_json(log.path.with_name("run.json"), asdict(options) | {"policy": source, "wanted": len(wanted)})
        begin = time.perf_counter()
        policy_options = {"chunk_size": chunk_size, "num_steps": options.num_steps or None}
        records = roll_out(
            spec,
            wanted,
            config,
            log,
            options.processes,
            options.environments,
            policy_options
            | {"device": options.device, "run_code": options.run_code, "keys": options.keys, "shown": options.shown},
        )
        numbers = summarise(records)
        found[identity["kind"]] = records
        print(
            f"{identity['kind']}: {numbers['successes']} of {numbers['episodes']} succeeded, "
            f"{100 * numbers['success_rate']:.1f} % (95 % interval {100 * numbers['interval_low']:.1f} to "
            f"{100 * numbers['interval_high']:.1f} %), {time.perf_counter() - begin:.0f} s"
        )
    return found


def short_name(model: str) -> str:
    """Of a checkpoint: trained ones lie in OUTPUT/model, others have the id OWNER/NAME."""
    return "/".join(Path(model).parts[-2:])


def delays(options: DelayOptions) -> None:
    """Rolls out every model in every mode with every delivery, and writes delays.json and delays.png."""
    from stereovla.evaluation.delays import deliveries
    from stereovla.evaluation.plots import draw_delays
    from stereovla.evaluation.rollouts import RolloutConfig, config_json, summarise
    from stereovla.evaluation.workers import roll_out
    from stereovla.serving.executor import MODES

    world, out, rows = _world(options), Path(options.out), []
    names = [short_name(model) for model in options.models]
    if len(set(names)) < len(names):
        raise InputError(f"--models has two of one name: {', '.join(names)}")
    identities = [policy_identity(model, options.run_code) for model in options.models]
    policy_options = {"num_steps": options.num_steps or None, "device": options.device, "run_code": options.run_code}
    for number, (model, name, identity) in enumerate(zip(options.models, names, identities, strict=True)):
        # of one process the model is loaded once, not for each of the rows
        policy = make_policy(model, **policy_options) if options.processes == 1 else None
        for delivery_name, delivery in deliveries(options, MODES if number == 0 else MODES[-1:]).items():
            config = RolloutConfig(world, options.execution_horizon, options.max_steps, delivery=delivery)
            saved = {**config_json(config), **identity, "num_steps": options.num_steps}
            log = EpisodeLog(out / "delays" / name.replace("/", "--") / delivery_name, saved, options.restart)
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            how = (options.processes, options.environments, policy_options, policy)
            records = roll_out(model, seeds, config, log, *how)
            held = sum(record["executor"].get("hold", 0) for record in records)
            held /= sum(record["executor"]["commands"] for record in records)
            row = {"model": name, "delivery": delivery_name, **asdict(delivery), "held_share": held}
            rows.append(row | summarise(records))
            print(
                f"{name}, {delivery_name}: {rows[-1]['successes']} of {rows[-1]['episodes']} succeeded, the arm stood "
                f"still for {100 * held:.0f} % of the time"
            )
    write_json(out / "delays.json", rows)
    draw_delays(rows, out / "delays.png")
    print(f"picture: {out / 'delays.png'}")


def _world(options: SimulatorOptions) -> Any:
    """The simulator's config; InputError for options that it does not have."""
    from stereovla.simulation import WorldConfig

    try:
        return WorldConfig.from_preset(**options.world_options())
    except ValueError as error:
        raise InputError(str(error)) from error


def offline(options: OfflineOptions) -> None:
    """Writes offline.json, unless it is there for the same weights and options."""
    check_checkpoint(options.model)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    how = ("out", "restart", "device", "model", "run_code")  # what is measured follows from the others
    saved = {key: value for key, value in asdict(options).items() if key not in how}
    saved["weights"] = fingerprint(options.model)
    path = out / "offline.json"
    if path.is_file() and not options.restart:
        if json.loads(path.read_text(encoding="utf-8"))["options"] == saved:
            print(f"{path} is there for these weights and options; --restart True computes it again")
            return

    from tqdm import tqdm  # the imports that take seconds come when something is left to do

    from stereovla.evaluation.held_out import count_rows, read_rows
    from stereovla.evaluation.model_policy import ModelPolicy
    from stereovla.evaluation.offline import OfflineEvaluation

    which = (options.dataset, options.rows, options.stride, options.split)
    count = count_rows(*which)
    loaded = load_checkpoint(options.model, options.device, options.run_code)
    policy = ModelPolicy(*loaded, "trained", options.num_steps or None)
    rows = tqdm(read_rows(*which), desc="held-out rows", total=count, unit="row")
    report = OfflineEvaluation(policy).evaluate(rows, options.batch_size)
    write_json(path, {"options": saved, **report})
    print(f"{report['rows']} held-out rows: {path}")


def inside(options: InsideOptions) -> Path:
    """Writes the pictures, their numbers and the page, and returns the page."""
    check_checkpoint(options.model)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    from stereovla.evaluation import inside_drawings as drawings
    from stereovla.evaluation.held_out import read_rows
    from stereovla.evaluation.inside import STREAMS, act, answer, attention_shares, geometries, keyframe_errors, look
    from stereovla.evaluation.inside_page import SECTIONS, write_page
    from stereovla.evaluation.model_policy import ModelPolicy

    policy = ModelPolicy(*load_checkpoint(options.model, options.device, options.run_code), "trained")
    if getattr(policy.model, "action_expert", None) is None:
        kind = policy.model.config.model_type
        raise InputError(f"{options.model} is a {kind!r}; what is inside is drawn of a 'stereovla' and of a 'depthvla'")
    rows = list(read_rows(options.dataset, options.rows, options.stride, options.split))
    if not rows:
        raise InputError(f"{options.dataset!r} has no rows in its split {options.split!r}")
    for name in SECTIONS:  # of an earlier look, which may have had others
        (out / name).unlink(missing_ok=True)
    shares = attention_shares(policy, rows)
    drawings.draw_attention(shares, len(rows), out / "attention.png")
    write_json(out / "attention.json", [dict(zip(STREAMS, layer, strict=True)) for layer in shares.tolist()])
    for number, layer in enumerate(shares, 1):
        parts = [f"{name} {100 * share:.0f} %" for name, share in zip(STREAMS, layer, strict=True) if share]
        print(f"layer {number}: {', '.join(parts)}")
    few = rows[:: -(-len(rows) // options.pictures)]
    drawings.draw_features(few, look(policy, few), out / "features.png")
    if found := geometries(policy, few):
        drawings.draw_geometry(found, out / "geometry.png")
    drawings.draw_answers(few, answer(policy, few), out / "answers.png")
    errors = keyframe_errors(rows, act(policy, rows))
    episode = [row for row in read_rows(options.dataset, options.episode_rows, 1, options.split)]
    episode = [row for row in episode if row.episode == episode[0].episode]
    told = act(policy, episode)
    if any(one.pointed is not None for one in told) and any(row.keyframe_pose is not None for row in episode):
        drawings.draw_strip(episode, told, out / "strip.png")
        drawings.draw_keyframe(episode, told, out / "keyframe.png")
    numbers = {
        f"keyframe that the pointers tell, {words}": f"median {of['median']:.2f} cm, mean {of['mean']:.2f} cm"
        for words, of in (("in the plane", errors["xy_cm"]), ("in height", errors["z_cm"]))
        if of
    }
    name = short_name(options.model)
    about = f"{len(rows)} held-out frames of {Path(options.dataset).name}, split {options.split}."
    return write_page(out, name, about, numbers)


def report(options: ReportOptions) -> Path:
    """Writes the report; returns its page."""
    from stereovla.evaluation.report import write_report

    return write_report(
        Path(options.out), Path(options.training) if options.training else None, options.film, options.film_seed
    )
