"""The policies as LeRobot drives them: batches of its datasets in, a loss or actions in robot units out."""

import logging
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import HfApi
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE

from .configuration_stereovla import DepthVLAConfig, Robot, StereoVLAConfig
from .model_folder import MODEL, load_model, model_folder, policy_folder, save_code, save_model

# as `stereovla train --lora_rank`: in language model, depth expert and action expert; whole: what knows the robot
LORA_TARGETS = (
    r"model\.(model\.(vlm\.)?language_model|model\.depth_expert\.decoder|action_expert\.transformer)\.layers\.\d+"
    r"\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)
LORA_HEADS = (
    *(f"model.action_expert.{name}" for name in ("state_proj", "action_in_proj", "action_out_proj")),
    "model.pointers.displacement",
    "model.pointers.displacement_token",
    "model.pointers.anchors",
    "model.pointers.carried_query",
    "model.pointers.turns",
)
STATISTICS = ("min", "max", "mean", "std", "q01", "q99")  # of LeRobot's, those that our processors know


class StereoVLAPolicy(PreTrainedPolicy):
    """A StereoVLA; `self.model` is the model of transformers, `self.processor` its processor."""

    config_class = StereoVLAConfig
    name = "stereovla"

    def __init__(
        self,
        config: StereoVLAConfig,
        folder: Path | None = None,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
    ):
        """
        Args:
            folder: of the model; None = that of `config.pretrained_model`.
            dataset_stats, dataset_meta: of LeRobot's dataset, from which the statistics of a new robot are taken.
        """
        super().__init__(config)
        config.validate_features()
        untrained = config.untrained and folder is None
        if folder is None:
            if config.pretrained_model is None:
                raise ValueError("pretrained_model is missing: the folder or Hub id of the model to start from")
            folder = model_folder(config.pretrained_model, config.pretrained_model_revision)
        self.model, self.processor = load_model(
            folder, config.type, config.may_run_code, untrained, config.weights_dtype
        )
        self._check_model()
        self._fit_robot(dataset_stats, dataset_meta)
        if config.chain_of_thought is not None and self._is_stereovla:
            self.model.config.chain_of_thought = config.chain_of_thought
        self.model.freeze(*config.freeze)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.reset()

    @property
    def _is_stereovla(self) -> bool:
        return self.config.type == StereoVLAPolicy.name

    def _check_model(self) -> None:
        """ValueError where the model is not as the config says, or needs what LeRobot's data does not have."""
        config, model = self.config, self.model.config
        for name in ("chunk_size", "state_history"):
            if getattr(config, name) != getattr(model, name):
                raise ValueError(f"{name} is {getattr(config, name)}, but the model's is {getattr(model, name)}")
        if set(config.views) != set(self.processor.pixel_views):
            raise ValueError(
                f"views are {', '.join(config.views)}, but the model sees {', '.join(self.processor.pixel_views)}; "
                "give --policy.views='{VIEW: CAMERA_KEY, ...}' with all of these"
            )
        if model.reads_depth:
            raise ValueError("this model is shown depth, which policies of LeRobot are not")
        if getattr(model, "points_frame", None) is not None and not model.calibration_dropout:
            raise ValueError(
                "this model sees points, which need the calibration of every pair, and LeRobot's policies are not told "
                "it: it was trained with calibration_dropout 0, so it never saw a pair without"
            )

    def _fit_robot(self, stats: dict[str, dict[str, Any]] | None, meta: Any) -> None:
        """Gives model and processor the robot's sizes and statistics, where they do not know it yet."""
        config, processor = self.config, self.processor
        known = sorted(processor.norm_stats or {})
        sizes = {"state_dim": config.input_features[OBS_STATE].shape[0], "action_dim": config.action_feature.shape[0]}
        if config.embodiment is None:
            if len(known) != 1:
                raise ValueError(
                    f"the model knows {', '.join(known) or 'no robot'}; say which one it is, or the name of a new "
                    "robot: --policy.embodiment=NAME"
                )
            config.embodiment = known[0]
        if config.embodiment not in known:
            if config.robot is None:
                if stats is None or meta is None:
                    raise ValueError(
                        f"embodiment {config.embodiment!r} is new to the model, which knows {', '.join(known)}; train "
                        "on a dataset of it first"
                    )
                config.robot = _robot_of(stats, meta, processor.normalization)
            self._add_robot(config.robot, sizes)
        rate_hz = (processor.control_rates_hz or {}).get(config.embodiment)
        if meta is not None and rate_hz is not None and rate_hz != meta.fps:
            logging.warning(f"the dataset has {meta.fps} Hz, but {config.embodiment} acts at {rate_hz:g} Hz")
        for name, size in sizes.items():
            if getattr(processor, name) != size:
                raise ValueError(
                    f"{name} is {getattr(processor, name)} for {config.embodiment!r}, but the data's has {size} "
                    "numbers; a new robot needs a new name: --policy.embodiment=NAME"
                )

    def _add_robot(self, robot: Robot, sizes: dict[str, int]) -> None:
        """Beside those that the processor knows, if they have the same sizes; else the model's heads become new."""
        processor, name = self.processor, self.config.embodiment
        same = all(getattr(processor, key) == size for key, size in sizes.items())
        of_robot = {
            # a keyframe is a state that the robot passes through
            "norm_stats": {"state": robot.state, "action": robot.action, "keyframe_pose": robot.state},
            "control_rates_hz": robot.control_rate_hz,
            "state_names": robot.state_names,
        }
        for field, value in of_robot.items():
            setattr(processor, field, {**((getattr(processor, field) or {}) if same else {}), name: value})
        processor.state_dim = processor.pose_dim = sizes["state_dim"]
        processor.action_dim = sizes["action_dim"]
        self.model.resize_heads(**sizes, num_turns=processor.num_turns)

    # ------------------------------------------------------------------------------------------------ to and from disk

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: StereoVLAConfig | None = None,
        revision: str | None = None,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        **of_hub: Any,
    ) -> Self:
        """The policy in a folder or on the Hub, in evaluation mode. Its code runs if `config.may_run_code`.

        Args:
            of_hub: of huggingface_hub's downloads: token, cache_dir, ...
        """
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision, **of_hub)
        folder = policy_folder(pretrained_name_or_path, revision, **of_hub) / MODEL
        return cls(config, folder, dataset_stats, dataset_meta).to(config.device).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        self.config._save_pretrained(save_directory)
        if state_dict is not None:
            state_dict = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        save_model(save_directory / MODEL, self.model, self.processor, state_dict)

    def push_model_to_hub(self, cfg: Any, peft_model: Any = None, **kwargs: Any) -> None:
        """As in LeRobot, which leaves out code: it follows in a second commit, unless an adapter is pushed."""
        super().push_model_to_hub(cfg, peft_model, **kwargs)
        if peft_model is not None:
            return
        with TemporaryDirectory() as folder:
            save_code(Path(folder), self.model, self.processor)
            HfApi().upload_folder(
                repo_id=self.config.repo_id,
                folder_path=folder,
                path_in_repo=MODEL,
                allow_patterns=["*.py", "*.jinja"],
                commit_message="Add the model's code",
            )

    # -------------------------------------------------------------------------------------------------------- training

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(
        self,
        batch: dict[str, Any],
        reduction: str = "mean",
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch, that of the actions alone, and its parts as numbers.

        Args:
            batch: as the preprocessor returns it: pictures uint8 (B, 3, H, W); observation.state (B, [history,] S);
                task, B sentences; action (B, chunk_size, A) in robot units, action_is_pad (B, chunk_size).
            noise: (B, K, chunk_size, A), time: (B, K), of flow matching; drawn when absent.
        """
        if reduction != "mean":
            raise ValueError(f"reduction is {reduction!r}; only 'mean' is valid: samples cannot be weighted")
        if self.training and self._is_stereovla and self.model.config.chain_of_thought:
            raise ValueError(
                "this model writes the keyframe pose before it acts, and LeRobot's data has no keyframes to learn it "
                "from; train it to act directly with --policy.chain_of_thought=false"
            )
        actions, padded = batch[ACTION], batch.get(f"{ACTION}_is_pad")
        targets = {"actions": list(actions.float().cpu().numpy())}
        if padded is not None:
            targets["action_mask"] = list((~padded.bool()).cpu().numpy())
        inputs = self._inputs(batch, self._states(batch), check_stereo=False, **targets)
        if self._is_stereovla:  # there is no keyframe in the prompt that could be hidden
            inputs["hide_pose"] = torch.zeros(len(actions), dtype=torch.bool, device=self.model.device)
        outputs = self.model(**inputs, noise=noise, time=time)
        parts = {name: value for name, value in outputs.items() if name.endswith("_loss") and value.ndim == 0}
        return outputs.loss, {name: value.item() for name, value in parts.items()}

    def _inputs(self, batch: dict[str, Any], states: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
        """What the model takes, by its processor."""
        pictures = {}
        for view, key in self.config.views.items():
            if key not in batch or batch[key].dtype != torch.uint8 or batch[key].ndim != 4:
                found = f"{batch[key].dtype} {tuple(batch[key].shape)}" if key in batch else "not there"
                raise ValueError(
                    f"{key} is {found}; expected uint8 (batch, 3, height, width), as the policy's preprocessor makes it"
                )
            pictures[view] = batch[key].permute(0, 2, 3, 1).cpu().numpy()
        tasks = batch.get("task")
        tasks = [tasks] * len(states) if isinstance(tasks, str) else tasks
        inputs = self.processor(
            images=[{view: of[row] for view, of in pictures.items()} for row in range(len(states))],
            text=tasks,
            state=list(states.float().cpu().numpy()),
            embodiment=self.config.embodiment,
            objective="action",
            **more,
        )
        return dict(inputs.to(self.model.device))

    def _states(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, history, S), oldest first."""
        states = batch[OBS_STATE]
        return states if states.ndim == 3 else states[:, None]

    # ---------------------------------------------------------------------------------------------------------- acting

    def reset(self) -> None:
        """A new episode begins: forgets states and what is left of the chunk."""
        self._history: deque[torch.Tensor] = deque(maxlen=self.config.state_history)
        self._actions: deque[torch.Tensor] = deque()
        self._looked = False

    def _note(self, batch: dict[str, Any]) -> torch.Tensor:
        """The states so far (B, n, S); a batch that has a history of its own is taken as it is."""
        if batch[OBS_STATE].ndim == 3:
            return batch[OBS_STATE]
        self._history.append(batch[OBS_STATE])
        return torch.stack(list(self._history), dim=1)

    def _chunk(self, batch: dict[str, Any], states: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        check = self.config.check_stereo and self.processor.check_stereo and "right" in self.config.views
        inputs = self._inputs(batch, states, check_stereo=check and not self._looked)
        self._looked = True
        chunk = self.model.predict_action(**inputs, noise=noise, num_steps=self.config.num_inference_steps)
        actions = self.processor.decode_actions(chunk, self.config.embodiment)
        return torch.from_numpy(actions).to(self.model.device)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """float32 (B, chunk_size, A) in robot units.

        Args:
            noise: (B, chunk_size, A), standard normal; drawn when absent.
        """
        return self._chunk(batch, self._note(batch), noise)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """float32 (B, A) in robot units, the next one of a chunk of which `n_action_steps` are executed."""
        states = self._note(batch)
        if not self._actions:
            chunk = self._chunk(batch, states, noise)
            self._actions.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        return self._actions.popleft()

    # ------------------------------------------------------------------------------------------------------------ LoRA

    def _get_default_peft_targets(self) -> dict[str, Any]:
        modules = dict(self.named_modules())
        return {"target_modules": LORA_TARGETS, "modules_to_save": [name for name in LORA_HEADS if name in modules]}


class DepthVLAPolicy(StereoVLAPolicy):
    """A DepthVLA."""

    config_class = DepthVLAConfig
    name = "depthvla"


def _robot_of(stats: dict[str, dict[str, Any]], meta: Any, mode: str) -> Robot:
    """A new robot by LeRobot's statistics of its dataset; ValueError where the processor's mode needs others."""
    of_keys = []
    needed = {"quantiles": ("q01", "q99"), "min_max": ("min", "max"), "mean_std": ("mean", "std")}[mode]
    for key in (OBS_STATE, ACTION):
        found = {
            name: torch.as_tensor(stats[key][name]).reshape(-1).tolist() for name in STATISTICS if name in stats[key]
        }
        if missing := [name for name in needed if name not in found]:
            raise ValueError(
                f"the dataset's statistics of {key} lack {', '.join(missing)}, with which this model normalises; "
                "LeRobot's augment_dataset_quantile_stats adds them"
            )
        of_keys.append(found)
    names = meta.features[OBS_STATE].get("names")
    flat = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    return Robot(*of_keys, control_rate_hz=float(meta.fps), state_names=list(flat))
