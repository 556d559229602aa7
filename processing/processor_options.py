"""ProcessorOptions: what a policy's processor is set to, how that is checked and saved, and what follows from it."""

import copy
import inspect
from typing import Any

from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from .answers import BinTokens
from .image_processing_stereovla import StereoImageProcessorPil
from .normalization import Normalizer
from .point_transforms import FRAMES
from .prompt_tokens import PromptTokens
from .sample_values import SampleReader
from .state_entries import check_state_names, rotations_of_states


class ProcessorOptions(ProcessorMixin):
    """The parts and options of every policy's processor."""

    images_first = False  # the layout of `PromptTokens`

    def __init__(
        self,
        image_processor,
        tokenizer,
        norm_stats: dict[str, Any] | None = None,
        normalization: str = "quantiles",
        control_rates_hz: dict[str, float] | None = None,
        chunk_size: int = 8,
        state_history: int = 4,
        state_dim: int = 7,
        action_dim: int = 7,
        pose_dim: int | None = None,
        state_names: dict[str, list[str]] | None = None,
        turn_symmetry: int = 0,
        num_visual_tokens: int = 256,
        num_bins: int = 256,
        action_vocab_size: int | None = None,
        image_token: str = "<image>",
        depth_decimals: int = 2,
        depth_unit_m: float = 1e-4,
        max_length: int | None = None,
        check_stereo: bool = True,
        points_frame: str | None = None,
    ):
        """Everything but the two parts is saved in processor_config.json. Every option may be assigned or edited later:
        what counts, and what is saved, is what stands there at that moment.

        Args:
            norm_stats: {embodiment: {"state" | "action" | "keyframe_pose": {"q01": [...], ...}}}, see `normalization`.
            normalization: "quantiles", "min_max" or "mean_std".
            control_rates_hz: {embodiment: steps per second of the action chunk}; carried for whoever executes the
                chunk.
            chunk_size: actions per chunk. state_history: states per sample, the current one included.
            pose_dim: numbers of a keyframe pose; None = state_dim.
            state_names: {embodiment: names of a state's numbers}, which say what is a rotation: "roll", "pitch", "yaw"
                (of several bodies "left_roll", ...), or "yaw" alone. [] = none is. A robot without an entry has poses
                (`state_entries.POSES`) where its state has 7 or 5 numbers, and otherwise no rotations.
            turn_symmetry: 0: a keyframe is written and told as it is. 1 or 2: of the rotations of a state, the turn of
                the tool about its own axis is told apart, and half a turn (2, of a gripper with two equal fingers)
                makes no other keyframe. Equal to the model's.
            num_visual_tokens: image tokens of a view (StereoVLA: of the pair); the model replaces them by its visual
                tokens.
            num_bins, action_vocab_size: bin b has the id action_vocab_size - b. None counts the tokenizer up to the
                bins of `build_tokenizer` or PaliGemma's places (<loc0000> ... <loc1023>), or all of it where it has
                neither, once: the number is saved, so that tokens which are added later move no bin. Tokenizers with
                special tokens after the bins must say what they count (92544 for InternLM2, whose pad token was
                appended).
            depth_decimals: decimals of depth answers in m.
            depth_unit_m: unit of `depth_map` images of integer type (the data sets' 16-bit PNG has 1e-4 m).
            max_length: longest sequence allowed, visual tokens included; None takes the tokenizer's model_max_length.
            check_stereo: look at every pair outside training for swapped or unrectified views (5 to 7 ms a pair).
                In a control loop pass check_stereo=False after the first observation.
            points_frame: "base" or "camera" for a model that sees points (`point_transforms`), which then wants the
                calibration of every sample that it is asked about; None for one that does not.
        """
        self.norm_stats = norm_stats
        self.normalization = normalization
        self.control_rates_hz = control_rates_hz
        self.chunk_size = chunk_size
        self.state_history = state_history
        self.state_dim = state_dim
        self.action_dim = action_dim
        self.pose_dim = pose_dim
        self.state_names = state_names
        self.turn_symmetry = turn_symmetry
        self.num_visual_tokens = num_visual_tokens
        self.num_bins = num_bins
        self.action_vocab_size = action_vocab_size
        self.image_token = image_token
        self.depth_decimals = depth_decimals
        self.depth_unit_m = depth_unit_m
        self.max_length = max_length
        self.check_stereo = check_stereo
        self.points_frame = points_frame
        super().__init__(image_processor, tokenizer)
        self._tokens: tuple[tuple, PromptTokens] | None = None
        self._check()

    @classmethod
    def _get_arguments_from_pretrained(cls, path: str, processor_dict: dict | None = None, **kwargs: Any) -> list[Any]:
        """The two parts. Auto classes would ask for trust_remote_code although this very file is in use already.

        Options of the processor are not theirs: the tokenizer would save them as its own.
        """
        own = inspect.signature(cls.__init__).parameters
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        return [StereoImageProcessorPil.from_pretrained(path, **kwargs), AutoTokenizer.from_pretrained(path, **kwargs)]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; ValueError where another policy's processor was saved: it would lose options silently."""
        saved = processor_dict.get("processor_class", cls.__name__)
        if saved != cls.__name__:
            raise ValueError(f"this folder has a {saved}, not a {cls.__name__}; AutoProcessor loads either")
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError, and nothing is written, where an option cannot be used."""
        self._check()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the image processor's options and the arguments of `__init__`."""
        # Without what is derived from them: ProcessorMixin would copy the tokenizer in it (0.3 s for 92,000 tokens).
        saved = copy.copy(self)
        del saved._tokens
        return super(ProcessorOptions, saved).to_dict()

    def _check(self) -> None:
        if self.pose_dim is None:
            self.pose_dim = self.state_dim
        if self.action_vocab_size is None:
            ids = [self.tokenizer.convert_tokens_to_ids(token) for token in ("<bin_1>", "<loc1023>")]
            known = [last for last in ids if last not in (None, self.tokenizer.unk_token_id)]
            self.action_vocab_size = known[0] + 1 if known else len(self.tokenizer)
        for name in ("chunk_size", "state_history", "state_dim", "action_dim", "pose_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.points_frame not in (None, *FRAMES):
            raise ValueError(f"points_frame is {self.points_frame!r}; valid: {', '.join(map(repr, FRAMES))}, or None")
        if self.turn_symmetry not in (0, 1, 2):
            raise ValueError(f"turn_symmetry is {self.turn_symmetry}; it must be 0, 1 or 2")
        check_state_names(self.state_names, self.state_dim)
        _ = self.tokens, self.normalizer

    @property
    def pixel_views(self) -> tuple[str, ...]:
        """Names of the views in the order of pixel_values; the first is "left"."""
        raise NotImplementedError

    @property
    def tokens(self) -> PromptTokens:
        """Writes prompts; made anew when the tokenizer or an option of it has changed."""
        tokenizer = self.tokenizer
        of_tokenizer = (tokenizer, len(tokenizer), tokenizer.model_max_length, *tokenizer.all_special_ids)
        options = (self.image_token, self.num_visual_tokens, self.num_bins, self.action_vocab_size, self.max_length)
        if self._tokens is None or self._tokens[0] != (of_tokenizer, options):
            self._tokens = (of_tokenizer, options), PromptTokens(tokenizer, *options, self.images_first)
        return self._tokens[1]

    @property
    def normalizer(self) -> Normalizer:
        """Converts with the statistics as they are now; a batch takes one."""
        return Normalizer(self.norm_stats, self.normalization, self._angles)

    @property
    def reader(self) -> SampleReader:
        """Reads samples of the sizes that are set now."""
        sizes = (self.state_history, self.state_dim, self.chunk_size, self.action_dim)
        return SampleReader(*sizes, self.depth_unit_m, self.pose_dim, "right" in self.pixel_views)

    @property
    def num_turns(self) -> int:
        """Rotations of a state, those of the robot with the most; at least 1, as a model's."""
        names = {*(self.norm_stats or {}), *(self.state_names or {})}
        return max([1, *(len(self.rotations(name)) for name in names)])

    def rotations(self, embodiment: str) -> tuple[tuple[int, ...], ...]:
        """Indices of the numbers of a robot's state that are rotations (`state_entries.rotations_in`)."""
        return rotations_of_states(self.state_names, embodiment, self.state_dim)

    def _angles(self, embodiment: str, key: str) -> list[int]:
        """Indices of the angles among the numbers of `key`; of actions none, whose turns are small. A keyframe is named
        as a state where it has as many numbers.
        """
        if key == "action" or (key == "keyframe_pose" and self.pose_dim != self.state_dim):
            return []
        return [index for group in self.rotations(embodiment) for index in group]

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that the model replaces by visual tokens."""
        return self.tokens.image_token_id

    @property
    def bins(self) -> BinTokens:
        """The rule that maps numbers in [-1, 1] to ids; `bins.vocab_size` is the size that it counts from."""
        return self.tokens.bins
