"""Draws losses of several trainings of `train.py` over their steps, runs of one name as their mean and range.

    python -m benchmarks.curves --runs interaction=RUN0 interaction=RUN1 uniform=RUN2 uniform=RUN3 --out curves.png

RUN is an --output_dir. Prints the last values as a table.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser

KEYS = [f"validation/{name}" for name in ("loss/action", "loss/keyframe", "loss/pointing", "loss/box", "accuracy/pose")]


@dataclass
class CurvesOptions:
    """What `python -m benchmarks.curves` can be told."""

    runs: list[str] = field(metadata={"help": "Trainings, each NAME=FOLDER; those of one name are drawn as one."})
    out: str = field(metadata={"help": "Picture, PNG."})
    keys: list[str] = field(default_factory=lambda: KEYS.copy(), metadata={"help": "Keys of losses.jsonl."})


def read_curves(folder: Path, keys: list[str]) -> dict[str, dict[int, float]]:
    """{key: {step: value}} of a training; ValueError for a key that it never logged."""
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    curves = {key: {line["step"]: line[key] for line in lines if key in line} for key in keys}
    if missing := [key for key, curve in curves.items() if not curve]:
        known = sorted({key for line in lines for key in line} - {"step"})
        raise ValueError(f"{folder} has no {', '.join(missing)}; it has {', '.join(known)}")
    return curves


def main(arguments: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(CurvesOptions, description=__doc__).parse_args_into_dataclasses(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[dict[str, dict[int, float]]]] = defaultdict(list)
    for run in options.runs:
        name, equals, folder = run.partition("=")
        if not equals:
            raise ValueError(f"--runs has {run!r}; each must be NAME=FOLDER")
        groups[name].append(read_curves(Path(folder), options.keys))
    figure, panels = pyplot.subplots(1, len(options.keys), figsize=(3.2 * len(options.keys), 3), squeeze=False)
    print("| runs | " + " | ".join(options.keys) + " |\n|" + "---|" * (1 + len(options.keys)))
    last = defaultdict(list)
    for key, panel in zip(options.keys, panels[0], strict=True):
        for name, curves in groups.items():
            steps = sorted(set.intersection(*(set(curve[key]) for curve in curves)))
            values = np.array([[curve[key][step] for step in steps] for curve in curves])
            (line,) = panel.plot(steps, values.mean(0), label=f"{name} ({len(curves)} runs)")
            panel.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
            last[name].append(f"{values[:, -1].mean():.3f} ({values[:, -1].min():.3f} to {values[:, -1].max():.3f})")
        panel.set_title(key, fontsize=9)
        panel.set_xlabel("step")
    for name, cells in last.items():
        print(f"| {name}, {len(groups[name])} | " + " | ".join(cells) + " |")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
