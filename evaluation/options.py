"""What the commands of `stereovla evaluate` can be told."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stereovla.command_line import json_object, option
from stereovla.evaluation.policies import SHOWN
from stereovla.sources import RUN_CODE, InputError

MAX_SEED = 2**32  # recorded episodes use seeds from here on, so that no evaluated episode can have been trained on

ROLLOUT_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"seeds": 2, "baseline_seeds": 1, "max_steps": 6, "image_size": 64, "processes": 1},
    "demo": {"seeds": 100, "baseline_seeds": 20, "max_steps": 50},
    "lab": {"seeds": 200, "baseline_seeds": 100, "image_size": 192},
}


LIBERO_EPISODES = 50  # initial states of each task
LIBERO_PRESETS: dict[str, dict[str, Any]] = {
    "official": {},
    "tiny": {"episodes": 1, "max_steps": 12, "image_size": 64, "processes": 1},
}


DELAY_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"seeds": 1, "max_steps": 8, "image_size": 64, "processes": 1, "latencies_ms": [0, 300]},
    "demo": {"seeds": 100},
    "lab": {"seeds": 200, "image_size": 192},
}


@dataclass
class EpisodeOptions:
    """Episodes in a simulator."""

    out: str = option("", "Folder of the results; finished episodes in it are kept, the same command does the rest.")
    execution_horizon: int = option(3, "Actions executed of each predicted chunk.")
    num_steps: int = option(0, "Euler steps of the action expert; 0 = the model's own.")
    processes: int = option(2, "Processes, one core each.")
    environments: int = option(8, "Worlds in lockstep per process.")
    device: str = option("cpu", "Where models run: cpu, cuda, cuda:1, ...")
    image_size: int = option(128, "Side of the square views, px (preset).")
    restart: bool = option(False, "Forget the results that are there.")
    run_code: bool = option(False, RUN_CODE)

    def __post_init__(self):
        require_out(self)
        for name in ("execution_horizon", "processes", "environments", "image_size"):
            at_least(self, name, 1)
        at_least(self, "num_steps", 0)


@dataclass
class SimulatorOptions(EpisodeOptions):
    """Episodes in our own world."""

    preset: str = option("demo", "Values of the options marked (preset).", choices=list(ROLLOUT_PRESETS))
    seeds: int = option(100, "Episodes of a trained model (preset).")
    first_seed: int = option(0, "Seed of the first episode.")
    max_steps: int = option(120, "Steps of 0.1 s after which an episode has failed (preset).")
    camera_range: str = option("small", "How far the camera pose varies: small, medium or large.")
    num_objects: int = option(3, "Objects on the table, the target included.")
    world: str = option("{}", 'More options of simulation.WorldConfig as JSON, such as \'{"preset": "geometry"}\'.')

    def __post_init__(self):
        super().__post_init__()
        for name in ("seeds", "max_steps"):
            at_least(self, name, 1)
        at_least(self, "first_seed", 0)
        last = self.first_seed + self.most_seeds - 1
        if last >= MAX_SEED:
            raise InputError(f"the last seed is {last}; seeds from 2**32 on belong to recorded data, take smaller ones")

    @property
    def most_seeds(self) -> int:
        """Episodes of the policy that has most."""
        return self.seeds

    def world_options(self) -> dict[str, Any]:
        """Keyword arguments of `simulation.WorldConfig.from_preset`; ValueError for JSON that is none."""
        own = {"camera_range": self.camera_range, "image_size": self.image_size, "num_objects": self.num_objects}
        extra = json_object("world", self.world, '{"preset": "geometry"}')
        if twice := sorted(extra.keys() & own.keys()):
            raise InputError(f"--world {self.world!r} says {', '.join(twice)}, which are options of their own")
        return own | extra


@dataclass
class PolicyOptions(EpisodeOptions):
    """Episodes of policies: one model, or those of a list."""

    model: str = option("", "Checkpoint, folder or Hub id.")
    policies: list[str] = option(
        [], "Policies instead: expert, still, untrained:PATH, PATH of a checkpoint, or ws://HOST:PORT."
    )
    keys: str = option("", "JSON file of the keys that a server of openpi's at ws://HOST:PORT is told under.")
    shown: str = option(
        "given",
        "What a model's geometry is shown: what there is, grey or no depth, the left view twice, or another scene.",
        choices=list(SHOWN),
    )

    def __post_init__(self):
        super().__post_init__()
        if bool(self.model) == bool(self.policies):
            raise InputError("give --model CHECKPOINT, or --policies POLICY ..., and not both")

    def specs(self) -> list[str]:
        """The policies to roll out."""
        return self.policies or [self.model]


@dataclass
class RolloutOptions(PolicyOptions, SimulatorOptions):
    """Closed-loop rollouts in the simulator on seeds that training never saw; success is counted by physics."""

    presets: ClassVar[dict[str, dict[str, Any]]] = ROLLOUT_PRESETS

    model: str = option("", "Checkpoint, folder or Hub id: rolls out expert, this model, and the same model untrained.")
    baseline_seeds: int = option(40, "Episodes of every other policy, on the first of the same seeds (preset).")
    calibration_error_deg: float = option(
        0.0, "Angle by which the camera's rotation is wrong that a model is told, about an axis that the seed draws."
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "baseline_seeds", 1)
        at_least(self, "calibration_error_deg", 0)
        if self.shown != "given" and self.model:
            raise InputError(f"--shown is {self.shown}; name the models that are shown it by --policies")

    @property
    def most_seeds(self) -> int:
        return max(self.seeds, self.baseline_seeds)

    def specs(self) -> list[str]:
        """The policies to roll out."""
        return self.policies or ["expert", self.model, f"untrained:{self.model}"]


@dataclass
class LiberoOptions(PolicyOptions):
    """Closed-loop rollouts in LIBERO or LIBERO-PRO, seen by a stereo pair, by the official protocol: each task's 50
    initial states, 10 steps of waiting, and the suite's limit of steps; LIBERO's own check decides about success.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = LIBERO_PRESETS

    preset: str = option("official", "Values of the options marked (preset).", choices=list(LIBERO_PRESETS))
    suite: str = option("libero_spatial", "Suite of LIBERO or LIBERO-PRO.")
    tasks: list[int] = option([], "Numbers of the tasks in the suite; none = all.")
    episodes: int = option(50, "Of each task, from its first initial state on; the protocol has 50 (preset).")
    max_steps: int = option(0, "Steps of 20 Hz after which an episode has failed; 0 = the protocol's (preset).")
    camera_range: str = option(
        "stock", "The agent view as LIBERO has it, or how far the camera pose varies around it: small, medium, large."
    )
    baseline_m: float = option(0.063, "Distance of the cameras of the pair, m.")
    wrist: bool = option(False, "Show the view of the camera in the hand too.")
    control: str = option(
        "pose",
        "pose: states and actions of this project at 10 Hz; osc: LIBERO's own at 20 Hz, for other projects' policies.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.control == "osc" and (wrong := {"expert", "still"} & {*self.specs()}):
            raise InputError(f"--control osc: {', '.join(sorted(wrong))} acts with --control pose alone")
        at_least(self, "max_steps", 0)
        if not 1 <= self.episodes <= LIBERO_EPISODES:
            raise InputError(f"--episodes is {self.episodes}; a task has {LIBERO_EPISODES} initial states")


@dataclass
class DelayOptions(SimulatorOptions):
    """Success in the simulator where the policy answers late, with jitter, with pictures that are missing, and from a
    server that restarts, for an arm that waits for each chunk and for one that does not. Time is simulated.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = DELAY_PRESETS

    models: list[str] = option(
        [], "Checkpoints, folders or Hub ids; the first is tried in all modes, others with real-time chunking alone."
    )
    latencies_ms: list[int] = option([0, 100, 200, 300, 500], "From an observation to its answer, ms (preset).")
    disturbed_ms: int = option(200, "Latency at which the disturbances below are tried, ms.")
    jitter_ms: int = option(150, "By how much the latency of each answer may differ, ms.")
    dropped_frames: float = option(0.3, "Share of the periods of 0.1 s without a new picture.")
    restart_ms: int = option(1000, "How long the server is away, once in each episode, ms.")

    def __post_init__(self):
        super().__post_init__()
        if not self.models:
            raise InputError("--models is missing: CHECKPOINT ..., folders or Hub ids")
        if not self.latencies_ms:
            raise InputError("--latencies_ms is empty: which latencies are tried?")


@dataclass
class HeldOutOptions:
    """A model, and the held-out rows that it is asked about."""

    out: str = option("", "Folder of the results.")
    model: str = option("", "Checkpoint, folder or Hub id.")
    dataset: str = option("", "Dataset, folder or Hub id.")
    split: str = option("validation", "Split with the held-out episodes.")
    rows: int = option(200, "Rows at most.")
    stride: int = option(5, "Every n-th row is taken; neighbours in an episode say nearly the same.")
    device: str = option("cpu", "Where the model runs: cpu, cuda, cuda:1, ...")
    run_code: bool = option(False, RUN_CODE)

    def __post_init__(self):
        require_out(self)
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing")
        for name in ("rows", "stride"):
            at_least(self, name, 1)


@dataclass
class OfflineOptions(HeldOutOptions):
    """Errors on held-out rows of a dataset: actions, depth answers, boxes, keyframe poses, disparity."""

    out: str = option("", "Folder of the results; offline.json is written there.")
    batch_size: int = option(16, "Rows at once.")
    num_steps: int = option(0, "Euler steps of the action expert; 0 = the model's own.")
    restart: bool = option(False, "Compute again what is there.")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "batch_size", 1)
        at_least(self, "num_steps", 0)


@dataclass
class InsideOptions(HeldOutOptions):
    """Draws what a policy looks at and what it makes of it: where the attention of its action tokens goes, by layer and
    in the picture, its features, depth or disparity, answers, and the keyframe through an episode.
    """

    out: str = option("", "Folder of the page inside.html, its pictures, and attention.json.")
    rows: int = option(32, "Rows at most.")
    stride: int = option(10, "Every n-th row is taken; neighbours in an episode say nearly the same.")
    pictures: int = option(4, "Rows of which pictures are drawn, at equal distances.")
    episode_rows: int = option(120, "Frames at most of the first episode, through which the keyframe is drawn.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("pictures", "episode_rows"):
            at_least(self, name, 1)


@dataclass
class ReportOptions:
    """Plots, a rollout film, report.html and report.json, and the metrics.json that the model card is made from."""

    out: str = option("", "Folder that rollout and offline wrote to; the report goes there too.")
    training: str = option("", "Folder of the training run; its losses.jsonl is plotted. Empty: no loss curves.")
    film: bool = option(True, "Make rollout.gif of the trained model.")
    film_seed: int = option(-1, "Episode of the film; -1 = the first success among the rollouts.")

    def __post_init__(self):
        require_out(self)


def require_out(options: Any) -> None:
    """InputError without --out."""
    if not options.out:
        raise InputError("--out is missing: the folder of the results")


def at_least(options: Any, name: str, low: int) -> None:
    """InputError if the option is smaller than `low`."""
    if getattr(options, name) < low:
        raise InputError(f"--{name} is {getattr(options, name)}; it must be at least {low}")
