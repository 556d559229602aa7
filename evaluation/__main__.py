"""Measures a policy.

    python -m evaluation rollout --model CHECKPOINT --out REPORT      closed-loop rollouts in the simulator
    python -m evaluation offline --model CHECKPOINT --dataset DATA --out REPORT    errors on held-out rows
    python -m evaluation report  --training RUN --out REPORT          plots, film, page and numbers of both

Each command goes on where an interrupted one stopped. `python -m evaluation COMMAND --help` lists its options.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from evaluation.checkpoints import InputError, check_checkpoint, fingerprint
from evaluation.episode_log import EpisodeLog, write_json
from evaluation.options import (
    ROLLOUT_PRESETS,
    OfflineOptions,
    ReportOptions,
    RolloutOptions,
    check_flags,
)
from evaluation.policies import policy_identity


def rollout(options: RolloutOptions) -> None:
    """Rolls out every policy and prints its success rate."""
    from evaluation.rollouts import RolloutConfig, config_json, summarise
    from evaluation.workers import roll_out
    from simulation import WorldConfig

    try:
        world = WorldConfig.from_preset(**options.world_options())
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    config = RolloutConfig(world, options.execution_horizon, options.max_steps)
    identities = {
        spec: policy_identity(spec) for spec in options.specs()
    }  # a bad one ends all before an hour has passed
    names = [identity["kind"] for identity in identities.values()]
    if len(set(names)) < len(names):
        raise InputError(f"--policies holds several of one kind ({', '.join(names)}); give each its own --out")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for spec, identity in identities.items():
        count = options.seeds if identity["kind"] == "trained" else options.baseline_seeds
        seeds = range(options.first_seed, options.first_seed + count)
        saved = {**config_json(config), **identity, "num_steps": options.num_steps}
        log = EpisodeLog(out / "rollouts" / identity["kind"], saved, options.restart)
        source = str(Path(spec).resolve()) if Path(spec).is_dir() else spec
        write_json(log.path.with_name("run.json"), asdict(options) | {"policy": source})
        begin = time.perf_counter()
        policy_options = {"chunk_size": max(8, options.execution_horizon), "num_steps": options.num_steps or None}
        records = roll_out(
            spec,
            seeds,
            config,
            log,
            options.processes,
            options.environments,
            policy_options | {"device": options.device},
        )
        numbers = summarise(records)
        print(
            f"{identity['kind']}: {numbers['successes']} of {numbers['episodes']} succeeded, "
            f"{100 * numbers['success_rate']:.1f} % (95 % interval {100 * numbers['interval_low']:.1f} to "
            f"{100 * numbers['interval_high']:.1f} %), {time.perf_counter() - begin:.0f} s"
        )


def offline(options: OfflineOptions) -> None:
    """Writes offline.json, unless it is there for the same weights and options."""
    check_checkpoint(options.model)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = {key: value for key, value in asdict(options).items() if key not in ("out", "restart", "device", "model")}
    saved["weights"] = fingerprint(options.model)
    path = out / "offline.json"
    if path.is_file() and not options.restart:
        if json.loads(path.read_text(encoding="utf-8"))["options"] == saved:
            print(f"{path} is there for these weights and options; --restart True computes it again")
            return

    from tqdm import tqdm  # the imports that take seconds come when something is left to do

    from evaluation.held_out import count_rows, read_rows
    from evaluation.model_policy import ModelPolicy, load_checkpoint
    from evaluation.offline import OfflineEvaluation

    which = (options.dataset, options.rows, options.stride, options.split)
    count = count_rows(*which)
    policy = ModelPolicy(*load_checkpoint(options.model, options.device), "trained", options.num_steps or None)
    rows = tqdm(read_rows(*which), desc="held-out rows", total=count, unit="row")
    report = OfflineEvaluation(policy).evaluate(rows, options.batch_size)
    write_json(path, {"options": saved, **report})
    print(f"{report['rows']} held-out rows: {path}")


def report(options: ReportOptions) -> None:
    """Writes the report."""
    from evaluation.report import write_report

    page = write_report(
        Path(options.out), Path(options.training) if options.training else None, options.film, options.film_seed
    )
    print(f"report: {page}")


COMMANDS: dict[str, tuple[Any, type, dict[str, dict[str, Any]]]] = {
    "rollout": (rollout, RolloutOptions, ROLLOUT_PRESETS),
    "offline": (offline, OfflineOptions, {}),
    "report": (report, ReportOptions, {}),
}


def parse(command: str, arguments: list[str]) -> Any:
    """Options of a command: those given, over the preset's values, over the defaults."""
    _, options, presets = COMMANDS[command]
    parser = HfArgumentParser(options, prog=f"python -m evaluation {command}", description=options.__doc__)
    check_flags(arguments, options)
    if presets:
        chosen = parser.parse_args(arguments).preset
        parser.set_defaults(**presets[chosen])
    return options(**vars(parser.parse_args(arguments)))


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise InputError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
        COMMANDS[command][0](parse(command, rest))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
