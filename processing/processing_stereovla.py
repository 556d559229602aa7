"""StereoProcessor: samples in, model inputs out; model outputs back to robot units."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .answers import BinTokens, CameraParameters, action_prompt, box_prompt, depth_prompt, parse_values, value_text
from .camera_geometry import check_stereo_pair
from .image_processing_stereovla import StereoImageProcessorPil, ViewGeometry, as_pairs
from .normalization import Normalizer
from .prompt_tokens import PromptTokens
from .sample_values import SampleReader, required, split_batch
from .state_entries import check_state_names, differences, rotations_of_states

PER_SAMPLE = (
    "text state embodiment objective actions action_mask keyframe_pose boxes points_px depths_m calibration depth_map "
    "target_px gripper_px"
).split()


class StereoProcessor(ProcessorMixin):
    """Turns samples into model inputs and model outputs into robot units.

    Model inputs (`__call__`), for a batch of B (a single sample gives B = 1):

    - pixel_values float32 (B, 2, 3, H, W): RGB in [0, 1], left view first.
    - input_ids int64 (B, L): BOS, image token x num_visual_tokens, text, and for "action" and "pose" the ids of the
      past states, of the current state, and with `return_labels` of the keyframe pose and EOS.
    - attention_mask int64 (B, L): 1 = token, 0 = padding.
    - labels int64 (B, L), with `return_labels` only: -100 = no loss; not shifted.
    - state float32 (B, state_history, state_dim): normalised, oldest first; zeros for "box", "depth" and "camera".
    - actions float32 (B, chunk_size, action_dim): normalised; zeros after the steps that were given. action_mask bool
      (B, chunk_size): valid steps. is_action bool (B,): sample has an action loss. With `actions` or `return_labels`.
    - disparity float32 (B, H, W), with `depth_map` only: px of the processed left view, 0 = unknown.
    - points float32 (B, 2, 2), with `target_px` or `gripper_px` only: (u, v) of the target and of the gripper in px
      of the processed left view, NaN = not visible.
    - displacement float32 (B, pose_dim), with points and `return_labels`, where pose_dim equals state_dim: the way from
      the present state to the keyframe (`state_entries.differences`; of rotations a rotation vector), divided by the
      state's scales, the three parts of a rotation by the largest of theirs; NaN where the sample has no keyframe.

    Objectives and their answers:

    - "action": keyframe pose and EOS as tokens, and the chunk `actions`. "pose": the same without `actions`. Labels:
      current state, pose and EOS; not the past states (as the released model was trained).
    - "box": 4 bins for the left and 4 for the right view (x_min, y_min, x_max, y_max), without EOS.
    - "depth": depths in m at pixels of the processed left view, as text, and EOS.
    - "camera": `answers.CameraParameters` of the processed left view, as text, and EOS.
    """

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
        num_visual_tokens: int = 256,
        num_bins: int = 256,
        action_vocab_size: int | None = None,
        image_token: str = "<image>",
        depth_decimals: int = 2,
        depth_unit_m: float = 1e-4,
        max_length: int | None = None,
        check_stereo: bool = True,
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
            num_visual_tokens: image tokens after BOS; the model replaces them by its visual tokens.
            num_bins, action_vocab_size: bin b has the id action_vocab_size - b. None counts the tokenizer up to the
                bins of `build_tokenizer`, or all of it where it has none, once: the number is saved, so that tokens
                which are added later move no bin. Tokenizers with special tokens after the bins must say what they
                count (92544 for InternLM2, whose pad token was appended).
            depth_decimals: decimals of depth answers in m.
            depth_unit_m: unit of `depth_map` images of integer type (the data sets' 16-bit PNG has 1e-4 m).
            max_length: longest sequence allowed, visual tokens included; None takes the tokenizer's model_max_length.
            check_stereo: look at every pair outside training for swapped or unrectified views (5 to 7 ms a pair).
                In a control loop pass check_stereo=False after the first observation.
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
        self.num_visual_tokens = num_visual_tokens
        self.num_bins = num_bins
        self.action_vocab_size = action_vocab_size
        self.image_token = image_token
        self.depth_decimals = depth_decimals
        self.depth_unit_m = depth_unit_m
        self.max_length = max_length
        self.check_stereo = check_stereo
        super().__init__(image_processor, tokenizer)
        self._tokens: tuple[tuple, PromptTokens] | None = None
        self._check()

    @classmethod
    def _get_arguments_from_pretrained(cls, path: str, processor_dict: dict | None = None, **kwargs: Any) -> list[Any]:
        """The two parts. Auto classes would ask for trust_remote_code although this very file is in use already."""
        return [StereoImageProcessorPil.from_pretrained(path, **kwargs), AutoTokenizer.from_pretrained(path, **kwargs)]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError, and nothing is written, where an option cannot be used."""
        self._check()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the image processor's options and the arguments of `__init__`."""
        # Without what is derived from them: ProcessorMixin would copy the tokenizer in it (0.3 s for 92,000 tokens).
        saved = copy.copy(self)
        del saved._tokens
        return super(StereoProcessor, saved).to_dict()

    def _check(self) -> None:
        if self.pose_dim is None:
            self.pose_dim = self.state_dim
        if self.action_vocab_size is None:
            last_bin = self.tokenizer.convert_tokens_to_ids("<bin_1>")
            known = last_bin not in (None, self.tokenizer.unk_token_id)
            self.action_vocab_size = last_bin + 1 if known else len(self.tokenizer)
        for name in ("chunk_size", "state_history", "state_dim", "action_dim", "pose_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_state_names(self.state_names, self.state_dim)
        _ = self.tokens, self.normalizer

    @property
    def tokens(self) -> PromptTokens:
        """Writes prompts; made anew when the tokenizer or an option of it has changed."""
        tokenizer = self.tokenizer
        of_tokenizer = (tokenizer, len(tokenizer), tokenizer.model_max_length, *tokenizer.all_special_ids)
        options = (self.image_token, self.num_visual_tokens, self.num_bins, self.action_vocab_size, self.max_length)
        if self._tokens is None or self._tokens[0] != (of_tokenizer, options):
            self._tokens = (of_tokenizer, options), PromptTokens(tokenizer, *options)
        return self._tokens[1]

    @property
    def normalizer(self) -> Normalizer:
        """Converts with the statistics as they are now; a batch takes one."""
        return Normalizer(self.norm_stats, self.normalization, self._angles)

    @property
    def reader(self) -> SampleReader:
        """Reads samples of the sizes that are set now."""
        return SampleReader(
            self.state_history, self.state_dim, self.chunk_size, self.action_dim, self.depth_unit_m, self.pose_dim
        )

    def _angles(self, embodiment: str, key: str) -> list[int]:
        """Indices of the angles among the numbers of `key`; of actions none, whose turns are small. A keyframe is named
        as a state where it has as many numbers.
        """
        if key == "action" or (key == "keyframe_pose" and self.pose_dim != self.state_dim):
            return []
        groups = rotations_of_states(self.state_names, embodiment, self.state_dim)
        return [index for group in groups for index in group]

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder that the model replaces by visual tokens."""
        return self.tokens.image_token_id

    @property
    def bins(self) -> BinTokens:
        """The rule that maps numbers in [-1, 1] to ids; `bins.vocab_size` is the size that it counts from."""
        return self.tokens.bins

    @property
    def model_input_names(self) -> list[str]:
        """Names that inference needs."""
        return ["pixel_values", "input_ids", "attention_mask", "state"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str | None] | None = None,
        state: Any = None,
        embodiment: str | Sequence[str] | None = None,
        objective: str | Sequence[str] = "action",
        *,
        actions: Any = None,
        action_mask: Any = None,
        keyframe_pose: Any = None,
        boxes: Any = None,
        points_px: Any = None,
        depths_m: Any = None,
        calibration: Any = None,
        depth_map: Any = None,
        target_px: Any = None,
        gripper_px: Any = None,
        return_labels: bool = False,
        padding_side: str | None = None,
        check_stereo: bool | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """One sample, or a batch: then `images` is a list of pairs and every other argument a list of the same length.

        Strings (`embodiment`, `objective`) may also be given once for the whole batch, and any entry of a list may be
        None. All pixels are those of the source views, before crop and resize.

        Args:
            images: [left, right], PIL RGB or uint8 (h, w, 3) arrays or tensors, of equal size.
            text: instruction ("action", "pose") or object name ("box"); not used by "depth" and "camera".
            state: (state_dim,) or (k, state_dim) with k <= state_history, oldest first, robot units. A shorter
                history is filled up with its oldest state: the arm stood still before the episode began.
            embodiment: key of norm_stats.
            objective: "action", "pose", "box", "depth" or "camera".
            actions: (n, action_dim), n <= chunk_size, robot units.
            action_mask: (n,) bool, all valid if None. Steps that are not valid keep their values: a data set's padding
                holds still.
            keyframe_pose: (pose_dim,) robot units.
            boxes: (2, 4) of the left and the right view, x_min, y_min, x_max, y_max in px.
            points_px: (2,) or (n, 2) (u, v) in px of the left view that a depth question asks about. depths_m: (n,)
                answers.
            calibration: mapping with focal_length_px, principal_point_px, baseline_m, transform_camera_to_base.
            depth_map: (h, w) of the left view, float in m or integer in depth_unit_m, 0 = unknown; needs calibration.
            target_px, gripper_px: (2,) px of the left view; None or NaN where it is not visible.
            return_labels: write the answers and `labels`; an answer that is missing is an error.
            padding_side: default "right" with return_labels, else "left".
            check_stereo: overrides the processor's own setting; never done with return_labels unless asked for here.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: bad input; the message names the argument, its value and what is allowed. StereoPairError (a
                ValueError) for views that are swapped, unrectified or the same.
        """
        pairs, batched = as_pairs(images)
        given = {name: value for name, value in locals().items() if name in PER_SAMPLE}
        samples = split_batch(given, len(pairs), batched)
        if (self.check_stereo and not return_labels) if check_stereo is None else check_stereo:
            for number, pair in enumerate(pairs):
                check_stereo_pair(*pair, name=f"images[{number}]" if batched else "images")
        views, geometries = self.image_processor.prepare(pairs)
        outputs = {"disparity": depth_map is not None, "points": target_px is not None or gripper_px is not None}
        outputs |= {"actions": return_labels or actions is not None}
        normalizer, reader = self.normalizer, self.reader
        rows = []
        for number, (sample, geometry) in enumerate(zip(samples, geometries, strict=True)):
            try:
                rows.append(self._read(sample, geometry, return_labels, outputs, normalizer, reader))
            except ValueError as error:
                if not batched:
                    raise
                raise ValueError(f"sample {number}: {error}") from error

        names = [sample["embodiment"] for sample in samples]
        shape = (self.state_history, self.state_dim)
        states = normalizer.normalize_batch([row.get("states") for row in rows], names, "state", shape)
        poses = normalizer.normalize_batch([row.get("pose") for row in rows], names, "keyframe_pose", (self.pose_dim,))
        sequences = self._sequences(rows, states, poses, return_labels)
        data = {"pixel_values": self.image_processor.to_pixel_values(views), "state": states.astype(np.float32)}
        data |= self.tokens.pad(sequences, padding_side or ("right" if return_labels else "left"))
        if not return_labels:
            del data["labels"]
        if outputs["actions"]:
            chunks = [row.get("actions", (None, None, 0)) for row in rows]
            shape = (self.chunk_size, self.action_dim)
            # what was not given holds still until it becomes 0: zeros may be far outside of a robot's range
            held = [
                chunk if chunk is None else chunk[np.minimum(np.arange(len(chunk)), n - 1)] for chunk, _, n in chunks
            ]
            actions = normalizer.normalize_batch(held, names, "action", shape)
            mask = np.zeros(actions.shape[:2], dtype=bool)
            for row, (chunk, valid, given_steps) in enumerate(chunks):
                if chunk is not None:
                    mask[row] = valid
                    actions[row, given_steps:] = 0
            data |= {"actions": actions.astype(np.float32), "action_mask": mask, "is_action": mask.any(axis=1)}
        if outputs["disparity"]:
            data["disparity"] = self._disparity([row.get("depth_map") for row in rows])
        if outputs["points"]:
            data["points"] = np.stack([row["points"] for row in rows]).astype(np.float32)
            if return_labels and self.pose_dim == self.state_dim:
                data["displacement"] = self._displacements(rows, names, normalizer)
        tensors = {name: torch.as_tensor(value) for name, value in data.items()}
        return BatchFeature({k: v.numpy() for k, v in tensors.items()} if return_tensors == "np" else tensors)

    def _read(
        self,
        sample: dict[str, Any],
        geometry: ViewGeometry,
        with_answer: bool,
        outputs: dict[str, bool],
        normalizer: Normalizer,
        reader: SampleReader,
    ) -> dict[str, Any]:
        """Checked values of one sample: "prompt", and what its objective needs of "states", "pose", "boxes", ..."""
        objective = sample["objective"]
        row: dict[str, Any] = {}
        if objective in ("action", "pose"):
            row |= {"prompt": action_prompt(reader.text(sample)), "states": reader.states(sample)}
            normalizer.statistics(sample["embodiment"], "state")  # an unknown embodiment is this sample's error
            if with_answer:
                row["pose"] = reader.pose(sample)
            if outputs["actions"] and objective == "action":
                required(sample, "actions")
                row["actions"] = reader.actions(sample)
        elif objective == "box":
            row["prompt"] = box_prompt(reader.text(sample))
            if with_answer:
                row["boxes"] = reader.boxes(sample, geometry)
        elif objective == "depth":
            points = reader.question_points(sample, geometry)
            row["prompt"] = depth_prompt(points)
            if with_answer:
                row["answer"] = value_text(reader.depths(sample, len(points)), self.depth_decimals)
        else:
            row["prompt"] = CameraParameters.prompt
            if with_answer:
                row["answer"] = reader.camera(sample, geometry).text()
        if sample["depth_map"] is not None:
            row["depth_map"] = reader.depth_map(sample, geometry)
        if outputs["points"]:
            row["points"] = reader.view_points(sample, ("target_px", "gripper_px"), geometry)
        return row

    def _displacements(self, rows: list[dict[str, Any]], names: list[str], normalizer: Normalizer) -> np.ndarray:
        """float32 (B, state_dim), see the class; NaN without a keyframe."""
        out = np.full((len(rows), self.state_dim), np.nan, dtype=np.float32)
        for number, (row, name) in enumerate(zip(rows, names, strict=True)):
            if "pose" in row:
                rotations = rotations_of_states(self.state_names, name, self.state_dim)
                way = differences(row["pose"], row["states"][-1], rotations)
                out[number] = normalizer.scale(way, name, "state", rotations)
        return out

    def _sequences(
        self, rows: list[dict[str, Any]], states: np.ndarray, poses: np.ndarray, with_answer: bool
    ) -> list[tuple[list[int], int, int]]:
        """Per sample its ids, the index of the first supervised one, and the number of ids that are to be generated."""
        eos = self.tokenizer.eos_token_id
        start, bins = self.tokens.start, self.bins
        answered = [number for number, row in enumerate(rows) if "answer" in row]
        texts = self.tokens.encode([row["prompt"] for row in rows] + [rows[number]["answer"] for number in answered])
        answers = dict(zip(answered, texts[len(rows) :], strict=True))
        state_ids, pose_ids = bins.encode(states.reshape(len(rows), -1)).tolist(), bins.encode(poses).tolist()
        sequences = []
        for number, row in enumerate(rows):
            ids = start + texts[number]
            first, room = len(ids), 0
            if "states" in row:
                ids += state_ids[number]
                first = len(ids) - self.state_dim
                ids += [*pose_ids[number], eos] if with_answer else []
                room = 0 if with_answer else self.pose_dim + 1
            elif "boxes" in row:
                ids += bins.encode_boxes(row["boxes"], self.image_processor.target_size).reshape(-1).tolist()
            elif "answer" in row:
                ids += [*answers[number], eos]
            sequences.append((ids, first, room))
        return sequences

    def _disparity(self, maps: list[tuple[np.ndarray, float] | None]) -> torch.Tensor:
        """Depth maps of the processed views, each with p = disparity * depth -> float32 (B, H, W) px, 0 = unknown."""
        depth = np.zeros((len(maps), *self.image_processor.target_size), dtype=np.float32)
        product = torch.zeros(len(maps), 1, 1)
        for row, entry in enumerate(maps):
            if entry is not None:
                depth[row], product[row] = entry
        depth = torch.from_numpy(depth)
        return torch.where(depth > 0, product / depth, 0.0)  # 0, negative and NaN are unknown, infinity gives 0

    def decode_actions(self, chunk: Any, embodiment: str | Sequence[str]) -> np.ndarray:
        """Normalised chunk (B, n, action_dim), tensor or array -> float32 (B, n, action_dim) in robot units.

        `embodiment` is one for all, or one per sample. The gripper command stays a number: < -0.5 closes, > 0.5
        opens, anything between keeps.
        """
        return self._decoded(chunk, embodiment, "action", ndim=3)

    def decode_poses(self, ids: Any, embodiment: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Generated pose ids (B, pose_dim, or more) -> (float32 (B, pose_dim) in robot units, valid bool (B,)).

        A pose is not valid if one of its ids is no bin; such ids count as -1 or 1, as in the released model.
        """
        ids = _array(ids)[..., : self.pose_dim]
        poses = self._decoded(self.bins.decode(ids), embodiment, "keyframe_pose", ndim=2)
        return poses, self.bins.is_bin(ids).all(axis=-1)

    def decode_boxes(self, ids: Any, source_size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Generated box ids (B, 8) -> (boxes float32 (B, 2, 4), left view first, in px; valid bool (B,)).

        Pixels are those of source views of `source_size` (height, width), or of the processed view if it is None. Not
        valid: an id that is no bin, or a box without area.
        """
        ids = _array(ids)[..., :8].reshape(-1, 2, 4)
        boxes = self.bins.decode_boxes(ids, self.image_processor.target_size)
        valid = self.bins.is_bin(ids).all(axis=(-2, -1)) & (boxes[..., 2:] > boxes[..., :2]).all(axis=(-2, -1))
        if source_size is not None:
            boxes = self.image_processor.geometry(source_size).source_boxes(boxes)
        return boxes.astype(np.float32), valid

    def decode_depths(self, ids: Any) -> list[list[float] | None]:
        """Generated ids (B, L), ignored after EOS -> per sample the depths in m, or None if it is no list."""
        return [_parsed(parse_values, text) for text in self._answer_texts(ids)]

    def decode_cameras(self, ids: Any) -> list[CameraParameters | None]:
        """Generated ids (B, L) -> per sample the camera of the processed view, or None if it has another form."""
        return [_parsed(CameraParameters.parse, text) for text in self._answer_texts(ids)]

    def _answer_texts(self, ids: Any) -> list[str]:
        rows = [_array(row).tolist() for row in ids]
        eos = self.tokenizer.eos_token_id
        rows = [row[: row.index(eos)] if eos in row else row for row in rows]
        return [self.tokenizer.decode([i for i in row if i != self.tokenizer.pad_token_id]) for row in rows]

    def _decoded(self, values: Any, embodiment: str | Sequence[str], key: str, ndim: int) -> np.ndarray:
        values = _array(values)
        if values.ndim != ndim:
            raise ValueError(f"normalised {key} has shape {values.shape}; expected {ndim} dimensions, batch first")
        names = [embodiment] * len(values) if isinstance(embodiment, str) or embodiment is None else list(embodiment)
        if len(names) != len(values):
            raise ValueError(f"{len(names)} embodiments for a batch of {len(values)}")
        normalizer = self.normalizer
        if len(set(names)) == 1:
            return normalizer.unnormalize(values, names[0], key).astype(np.float32)
        rows = [normalizer.unnormalize(row, name, key) for row, name in zip(values, names, strict=True)]
        return np.stack(rows).astype(np.float32)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
    return np.asarray(values)


def _parsed(parse: Any, text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return None
