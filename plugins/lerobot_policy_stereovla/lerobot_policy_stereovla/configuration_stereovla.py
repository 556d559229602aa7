"""What LeRobot is told of a policy, `--policy.NAME=...`, and what it asks for: windows, optimizer, schedule."""

from dataclasses import dataclass, field

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from .model_folder import WEIGHTS_DTYPES, model_folder, read_sizes


@dataclass
class Robot:
    """What the model's processor has to know of a robot that it was not trained for; taken from a dataset.

    Args:
        state, action: {"q01": [...], "q99": [...], "min", "max", "mean", "std"}, one number per entry, robot units.
        state_names: what the numbers of a state are; "roll", "pitch", "yaw" are rotations. [] = none is.
    """

    state: dict[str, list[float]] = field(default_factory=dict)
    action: dict[str, list[float]] = field(default_factory=dict)
    control_rate_hz: float = 0.0
    state_names: list[str] = field(default_factory=list)


@PreTrainedConfig.register_subclass("stereovla")
@dataclass
class StereoVLAConfig(PreTrainedConfig):
    """A StereoVLA in LeRobot.

    Args:
        pretrained_model: folder or Hub id of the model in transformers' form that a new policy starts from: its
            config.json, its processor and its weights. A policy that was saved brings its model itself.
        pretrained_model_revision: of that id.
        untrained: draw fresh weights; only config.json and processor of `pretrained_model` are read.
        run_code: run the Python code that the model's folder brings. Nothing is run without it. It is never saved: it
            has to be said each time, as in `--policy.run_code=true`.
        embodiment: the robot, a name by which the model's processor knows statistics; None = the only one that it
            knows. A name that it does not know is a new robot, whose statistics are taken from the dataset.
        views: {view of the model: camera key of the dataset}.
        chunk_size, state_history: actions per chunk and states per observation; None = those of the model.
        n_action_steps: actions that are executed of each chunk; None = all.
        num_inference_steps: Euler steps; None = the model's own.
        chain_of_thought: whether the keyframe pose is written before it acts; None = as the model's config says. Must
            be False in training: LeRobot's data has no keyframes.
        check_stereo: look at the first pair of each episode for swapped or unrectified views.
        freeze: parts that are not trained, such as semantic, spatial, stereo.
        weights_dtype: "float32", "bfloat16", "float16", or "saved" for that of the files.
        robot: set where the robot is new to the model.
    """

    pretrained_model: str | None = None
    pretrained_model_revision: str | None = None
    untrained: bool = False
    run_code: bool = False
    embodiment: str | None = None
    views: dict[str, str] = field(
        default_factory=lambda: {"left": f"{OBS_IMAGES}.left", "right": f"{OBS_IMAGES}.right"}
    )
    chunk_size: int | None = None
    state_history: int | None = None
    n_action_steps: int | None = None
    num_inference_steps: int | None = None
    chain_of_thought: bool | None = None
    check_stereo: bool = True
    freeze: list[str] = field(default_factory=list)
    gradient_checkpointing: bool = False
    weights_dtype: str = "float32"
    robot: Robot | None = None

    # the model's processor normalises
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {kind: NormalizationMode.IDENTITY for kind in ("VISUAL", "STATE", "ACTION")}
    )

    optimizer_lr: float = 1e-4  # as `stereovla train --preset full`
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1000
    scheduler_decay_steps: int = 160_000
    scheduler_decay_lr: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        # said by the user, and not kept where it would be saved: nobody's folder may say it
        self._may_run_code, self.run_code = self.run_code, False
        if self.weights_dtype not in WEIGHTS_DTYPES:
            raise ValueError(f"weights_dtype is {self.weights_dtype!r}; valid: {', '.join(WEIGHTS_DTYPES)}")
        if wrong := {kind: mode for kind, mode in self.normalization_mapping.items() if mode.value != "IDENTITY"}:
            raise ValueError(
                f"normalization_mapping is {wrong}; only IDENTITY is valid: the model's processor normalises"
            )
        if self.pretrained_model is not None and None in (self.chunk_size, self.state_history):
            sizes = read_sizes(
                model_folder(self.pretrained_model, self.pretrained_model_revision, code=False), self.type
            )
            self.chunk_size = sizes["chunk_size"] if self.chunk_size is None else self.chunk_size
            self.state_history = sizes["state_history"] if self.state_history is None else self.state_history
        if self.chunk_size is not None:
            self.n_action_steps = self.chunk_size if self.n_action_steps is None else self.n_action_steps
            if not 1 <= self.n_action_steps <= self.chunk_size:
                raise ValueError(
                    f"n_action_steps is {self.n_action_steps}; it must be from 1 to chunk_size ({self.chunk_size})"
                )

    @property
    def may_run_code(self) -> bool:
        """Whether the user has said that the code in the model's folder is to be run."""
        return self._may_run_code

    @property
    def observation_delta_indices(self) -> list[int] | None:
        history = self._known("state_history")
        return None if history == 1 else list(range(1 - history, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self._known("chunk_size")))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def _known(self, name: str) -> int:
        if getattr(self, name) is None:
            raise ValueError(
                f"{name} is not known, as there is no model: give --policy.pretrained_model=FOLDER_OR_ID for a new "
                "policy, or --policy.path=POLICY for one that was saved"
            )
        return getattr(self, name)

    def validate_features(self) -> None:
        """ValueError where the data lacks a camera, the state or the actions."""
        inputs, outputs = self.input_features or {}, self.output_features or {}
        cameras = [key for key, feature in inputs.items() if feature.type is FeatureType.VISUAL]
        if absent := {view: key for view, key in self.views.items() if key not in cameras}:
            raise ValueError(
                f"views says {absent}, but the data has the cameras {', '.join(cameras) or 'none'}; say which it is: "
                "--policy.views='{left: observation.images.NAME, right: observation.images.NAME}'"
            )
        if OBS_STATE not in inputs or len(inputs[OBS_STATE].shape) != 1:
            raise ValueError(f"the data has no {OBS_STATE} of numbers; it has {', '.join(inputs)}")
        if ACTION not in outputs:
            raise ValueError(f"the data has no {ACTION}; it has {', '.join(outputs)}")

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )


@PreTrainedConfig.register_subclass("depthvla")
@dataclass
class DepthVLAConfig(StereoVLAConfig):
    """A DepthVLA in LeRobot; `views` are all that it sees, such as {left: ..., wrist: ...}."""

    views: dict[str, str] = field(default_factory=lambda: {"left": f"{OBS_IMAGES}.left"})
