"""Command line: `python -m dataset_builder build | merge | pipeline | import-* | export-lerobot | check | card`."""

import argparse
import sys
from pathlib import Path

USAGE = """usage: python -m dataset_builder COMMAND ...

commands:
  build --out DIR [options]     record episodes into DIR, or go on where a build was interrupted; see build --help
  merge DIR [PART ...]          join what machines recorded by build --shard-index I --num-shards N, into DIR or into
                                folders of their own (PART), and finish the dataset
  pipeline --out DIR [options]  build and merge as tasks of datatrove, local, Slurm or Ray; see pipeline --help
  import-lerobot | import-droid --source DIR --config YAML --out DIR [options]
                                check recorded episodes and import them; every problem is named, exit status 1 if any
  export-lerobot --dataset DIR --out DIR [options]
                                write DIR as a LeRobot dataset v3.0
  check DIR [--quick]           compare DIR with its manifest and the schema, check timestamps and views, and name every
                                problem; exit status 1 if there is any
  card DIR                      write the dataset card of DIR anew
"""


def parse_build(arguments: list[str], kind: type | None = None, command: str = "build"):
    """BuildConfig (or one of its kind) of a command line: given options over the preset's over the defaults."""
    from transformers import HfArgumentParser

    from dataset_builder.build import PRESETS, BuildConfig

    parser = HfArgumentParser(
        kind or BuildConfig,
        prog=f"python -m dataset_builder {command}",
        description="Record stereo demonstrations into a dataset folder; the same command goes on after interruptions.",
    )
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="demo")
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in PRESETS:
        parser.error(f"--preset {preset!r} is not one of {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[preset])
    (config,) = parser.parse_args_into_dataclasses(arguments)
    return config


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if command == "build":
            from dataset_builder.build import build

            config = parse_build(rest)
            part = f" (part {config.shard_index} of {config.num_shards})" if config.num_shards > 1 else ""
            print(f"dataset: {build(config)}{part}")
            return 0
        if command == "pipeline":
            from dataset_builder.pipeline import PipelineConfig, run_pipeline

            print(f"dataset: {run_pipeline(parse_build(rest, PipelineConfig, command))}")
            return 0
        if command == "merge":
            from dataset_builder.parts import merge

            parser = argparse.ArgumentParser(prog="python -m dataset_builder merge", description=merge.__doc__)
            parser.add_argument("dir", type=Path, help="folder of the dataset, which may hold a part already")
            parser.add_argument("parts", type=Path, nargs="*", help="folders that machines recorded into")
            options = parser.parse_args(rest)
            print(f"dataset: {merge(options.dir, options.parts)}")
            return 0
        if command in ("import-lerobot", "import-droid", "export-lerobot"):
            return _convert(command, rest)
        if command in ("check", "card"):
            parser = argparse.ArgumentParser(prog=f"python -m dataset_builder {command}")
            parser.add_argument("dir", type=Path, help="folder of a dataset")
            if command == "check":
                parser.add_argument("--quick", action="store_true", help="look into the first row of each shard only")
            return {"check": _check, "card": _card}[command](**vars(parser.parse_args(rest)))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"error: unknown command {command!r}\n\n{USAGE}", file=sys.stderr)
    return 2


def _convert(command: str, arguments: list[str]) -> int:
    from transformers import HfArgumentParser

    from dataset_builder import droid_source, importing, lerobot_export, lerobot_source
    from dataset_builder.folders import INFO
    from dataset_builder.rig import read_rig
    from dataset_builder.shards import read_json

    kind, describe = {
        "import-lerobot": (lerobot_source.LeRobotImportConfig, lerobot_source),
        "import-droid": (droid_source.DroidImportConfig, droid_source),
        "export-lerobot": (lerobot_export.LeRobotExportConfig, lerobot_export),
    }[command]
    parser = HfArgumentParser(kind, prog=f"python -m dataset_builder {command}", description=describe.__doc__)
    (config,) = parser.parse_args_into_dataclasses(arguments)
    if command == "export-lerobot":
        print(f"LeRobot dataset: {lerobot_export.export_lerobot(config)}")
        return 0
    rig = read_rig(Path(config.config))
    if command == "import-lerobot":
        source = lerobot_source.open_lerobot(config, rig)
    else:
        source, rig = droid_source.open_droid(config, rig)
    try:
        folder = importing.import_dataset(config, rig, source)
    except importing.ProblemsFound as error:
        print(error)
        return 1
    info = read_json(folder / INFO)
    for name, problems in info["dropped"].items():
        print("\n".join(f"{name}: {problem}" for problem in problems))
    for name in info["not_judged"]:
        print(f"{name}: no pair has enough structure to check order and rectification")
    print(f"dataset: {folder}; {len(info['dropped'])} episodes left out")
    return 0


def _check(dir: Path, quick: bool) -> int:
    from dataset_builder.checking import find_problems
    from dataset_builder.episode_checks import dataset_problems

    problems = find_problems(dir, quick=quick)
    if not problems:  # what cannot be read cannot be looked at
        problems = dataset_problems(dir)
    print("\n".join(problems) if problems else f"{dir} is whole")
    return 1 if problems else 0


def _card(dir: Path) -> int:
    from dataset_builder.card import write_card

    print(f"card: {write_card(dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
