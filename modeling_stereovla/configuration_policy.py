"""What the configurations of all our policies share."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_stereo_encoder import refuse_unknown_keys


@strict
class PolicyConfig(PreTrainedConfig):
    r"""
    Sizes of a policy with a language model, `text_config`, and an action expert that reads it.

    Args:
        image_size, patch_size (`int`):
            Side of the views and stride of the visual tokens, px.
        expert_hidden_size, expert_intermediate_size (`int`):
            Widths of the action expert; its depth and heads are the language model's.
        state_dim, state_history, action_dim, chunk_size, pose_dim (`int`):
            Entries of a state, steps of state history, entries of an action, steps of a chunk, entries of a keyframe.
        num_bins, action_vocab_size (`int`):
            Poses and boxes are written as uniform bins over [-1, 1]; bin b is the token `action_vocab_size - b`.
        image_token_id (`int`):
            The token that visual tokens replace.
        num_inference_steps (`int`):
            Euler steps from noise to actions.
        noise_scale (`float` in [0, 1]):
            Standard deviation of the noise that `predict_action` starts from; 0 starts from the noise's mean, which
            takes a fifth off the error of a small policy whose demonstrations are unimodal.
        time_alpha, time_beta, time_min, time_max (`float`):
            Flow-matching times are Beta(alpha, beta) scaled to [time_min, time_max].
        min_period, max_period (`float`), time_embedding_dtype (`str`):
            Periods of the time embedding; "float32", or "model" to compute it in the model's dtype as StereoVLA's
            released code does.
        flow_draws (`int`):
            Noise and time draws of each sample in one training step.
        max_delay (`int`, below chunk_size):
            Longest delay, in steps, that training simulates for real-time chunking: the first 0 to `max_delay` actions
            of each noisy chunk are given as they are. 0 = not trained so; such a model is guided instead.
        use_pointers (`bool`):
            The pointing loss and its read-out tokens (`pointing.py`); not in the papers.
        points_at_destination (`bool`):
            A third pointer, for where the target is to be put, and pointers that read the words in their order.
        turn_symmetry, num_turns (`int`):
            0: the pointers tell the yaw of the way to the keyframe as a number like its others. 1 or 2: the turn of the
            tool about its own axis is apart from it and has no seam (`turns.py`), modulo a whole turn, or half a turn,
            after which a gripper with two equal fingers holds alike. num_turns: rotations of a state, two for two arms.
        action_loss_weight, language_loss_weight, pointing_loss_weight, keyframe_loss_weight, naming_loss_weight:
            Weights of the summed loss. The last is of pointing at every object in the picture by its name.
    """

    image_size: int = 224
    patch_size: int = 14
    expert_hidden_size: int = 1024
    expert_intermediate_size: int = 2048
    state_dim: int = 7
    state_history: int = 1
    action_dim: int = 7
    chunk_size: int = 16
    pose_dim: int = 7
    num_bins: int = 256
    action_vocab_size: int = 92544
    image_token_id: int = 92545
    num_inference_steps: int = 10
    noise_scale: float | int = 1.0
    time_alpha: float | int = 1.5
    time_beta: float | int = 1.0
    time_min: float | int = 0.001
    time_max: float | int = 1.0
    min_period: float | int = 4e-3
    max_period: float | int = 4.0
    time_embedding_dtype: str = "float32"
    flow_draws: int = 1
    max_delay: int = 0
    use_pointers: bool = False
    points_at_destination: bool = False
    turn_symmetry: int = 0
    num_turns: int = 1
    action_loss_weight: float | int = 1.0
    language_loss_weight: float | int = 1.0
    pointing_loss_weight: float | int = 0.0
    keyframe_loss_weight: float | int = 0.0
    naming_loss_weight: float | int = 0.0
    initializer_range: float | int = 0.02

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output layer is the embedding; the language model says so, transformers asks here."""
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    @property
    def num_visual_tokens(self) -> int:
        """Of one view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_pointers(self) -> int:
        """What the pointers mark: target and gripper, and with `points_at_destination` a destination."""
        return 2 + self.points_at_destination if self.use_pointers else 0

    @property
    def num_image_tokens(self) -> int:
        """Tokens that an image is written as, by the processor (`num_visual_tokens` there)."""
        return self.num_visual_tokens

    def validate_policy(self) -> None:
        """ValueError for shared fields that contradict each other."""
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}; it must be divisible by patch_size ({self.patch_size})")
        if self.expert_hidden_size % 2:
            raise ValueError(f"expert_hidden_size is {self.expert_hidden_size}; the time embedding needs an even width")
        if not self.num_bins < self.action_vocab_size <= self.text_config.vocab_size:
            raise ValueError(
                f"action_vocab_size is {self.action_vocab_size}; it must lie above num_bins ({self.num_bins}) and not "
                f"above the language model's vocab_size ({self.text_config.vocab_size})"
            )
        if self.time_embedding_dtype not in ("float32", "model"):
            raise ValueError(f"time_embedding_dtype is {self.time_embedding_dtype!r}; it must be 'float32' or 'model'")
        if not 0 <= self.noise_scale <= 1:
            raise ValueError(f"noise_scale is {self.noise_scale}; it must be in [0, 1]")
        if not 0 <= self.time_min < self.time_max <= 1:
            raise ValueError(
                f"time_min, time_max are {self.time_min}, {self.time_max}; 0 <= time_min < time_max <= 1 must hold"
            )
        if self.turn_symmetry not in (0, 1, 2):
            raise ValueError(
                f"turn_symmetry is {self.turn_symmetry}; it must be 0 (yaw is a number), 1 or 2 (of two fingers)"
            )
        if self.points_at_destination and not self.use_pointers:
            raise ValueError("points_at_destination is True and use_pointers False; it needs pointers")
        for name, value in vars(self).items():
            if name.endswith("_loss_weight") and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be a finite number, at least 0")
        if self.num_bins < 2:
            raise ValueError(f"num_bins is {self.num_bins}; it must be at least 2")
        sizes = ("state_dim", "state_history", "action_dim", "chunk_size", "pose_dim", "num_turns", "flow_draws")
        for name in (*sizes, "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.max_delay < self.chunk_size:
            raise ValueError(
                f"max_delay is {self.max_delay}; it must be at least 0 and below chunk_size ({self.chunk_size})"
            )


def with_overrides(values: dict, overrides: dict) -> dict:
    """`values` with `overrides`; a dict replaces single fields of a part, and of its parts, or brings in a part that
    is absent.
    """

    def merged(name: str, value: Any) -> Any:
        is_part = isinstance(value, dict) and name.endswith("_config")
        return with_overrides(values.get(name) or {}, value) if is_part else value

    return {**values, **{name: merged(name, value) for name, value in overrides.items()}}


def overridden(kind: type[PreTrainedConfig], values: dict, overrides: dict) -> PreTrainedConfig:
    """The config of a `kind` with `values` and `overrides`, see `with_overrides`.

    Raises:
        ValueError: an override that is no field of the config or of its part; transformers' own keep it silently.
    """
    config = kind(**with_overrides(values, overrides))
    _refuse_unknown(config, values, overrides)
    return config


def _refuse_unknown(config: PreTrainedConfig, values: dict, overrides: dict) -> None:
    # known is also what the values have, such as the image_size that a convolutional part has no field for, and what
    # transformers writes into a description without its being a field, such as a backbone's out_features
    plain = None if isinstance(config, PolicyConfig) else type(config)()
    unknown = {name: value for name, value in overrides.items() if name not in values and not hasattr(plain, name)}
    refuse_unknown_keys(config, unknown)
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(part := getattr(config, name), PreTrainedConfig):
            _refuse_unknown(part, values.get(name) or {}, value)


def own_fields(config: PreTrainedConfig) -> dict:
    """Fields of a part's config as part of ours: without what describes the folder that it came from."""
    return _without(config.to_dict(), ("architectures", "dtype", "transformers_version", "_name_or_path"))


def _without(fields: dict, names: tuple[str, ...]) -> dict:
    """Fields without those of these names, also within the configs of parts."""
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in names
    }
