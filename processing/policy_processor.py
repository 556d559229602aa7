"""PolicyProcessor: the part of the processors that does not depend on the policy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature

from .answers import CameraParameters, box_prompt, camera_prompt, depth_prompt, parse_values, points_text, value_text
from .camera_geometry import Calibration, check_stereo_pair, project_points
from .image_processing_stereovla import ViewGeometry
from .normalization import Normalizer
from .point_transforms import point_transform
from .processor_options import ProcessorOptions
from .prompt_tokens import IGNORE_INDEX, PromptTokens
from .sample_values import OBJECTIVES, SampleReader, required, split_batch
from .state_entries import begins_with_position, differences, differences_and_turns, written_alike

PER_SAMPLE = (
    "text state embodiment objective actions action_mask keyframe_pose keyframe_symmetry boxes points_px depths_m "
    "calibration depth_map target_px gripper_px destination_px target_name names names_px"
).split()
POINTS_PX = ("target_px", "gripper_px", "destination_px")  # what pointers mark, in their order


class PolicyProcessor(ProcessorOptions):
    """What the processors of all policies do; what they return is in their own docstrings."""

    pose_answers: tuple[str, ...] = ("pose",)  # objectives whose answer is the keyframe pose
    sets_of_views = "samples"  # as errors call them

    # ------------------------------------------------------------------------------------------- each policy's own

    def _views_of(self, images: Any) -> tuple[list[tuple[np.ndarray | None, ...]], bool]:
        """Checked views per sample in the order of `pixel_views`, None where one is absent; were they a list."""
        raise NotImplementedError

    def _action_prompt(self, objective: str, text: str, form: str) -> str:
        """Prompt of "action" or "pose"."""
        raise NotImplementedError

    def _read_depth(self, sample: dict[str, Any], views: tuple[np.ndarray | None, ...], reader: SampleReader) -> Any:
        """Checked `depth_map` of a sample, which is not None."""
        raise NotImplementedError

    def _sequence(
        self,
        tokens: PromptTokens,
        objective: str,
        views: tuple[np.ndarray | None, ...],
        ids: tuple[list[int], list[int], list[int]],
        with_answer: bool,
    ) -> tuple[list[int], int, int]:
        """Ids of the prompt, the states and the answer -> all ids of a sample, the index of the first supervised one,
        and the number of ids that are to be generated.
        """
        raise NotImplementedError

    def _own_inputs(
        self,
        rows: list[dict[str, Any]],
        views: list[tuple[np.ndarray | None, ...]],
        data: dict[str, np.ndarray],
        maps: list[Any] | None,
        with_answer: bool,
    ) -> dict[str, Any]:
        """Inputs that only this policy takes: of checked values (`_read`), of the padded ids and labels in `data`, and
        of `maps` of `_read_depth`, None where none was asked for.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------------- for all

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
        keyframe_symmetry: Any = None,
        boxes: Any = None,
        points_px: Any = None,
        depths_m: Any = None,
        calibration: Any = None,
        depth_map: Any = None,
        target_px: Any = None,
        gripper_px: Any = None,
        destination_px: Any = None,
        target_name: str | Sequence[str | None] | None = None,
        names: Any = None,
        names_px: Any = None,
        return_labels: bool = False,
        padding_side: str | None = None,
        check_stereo: bool | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """One sample, or a batch: then `images` is a list and every other argument a list of the same length.

        Strings (`embodiment`, `objective`) may also be given once for the whole batch, and any entry of a list may be
        None. All pixels are those of the source views, before crop and resize.

        Args:
            images: the views as the class says, PIL RGB or uint8 (h, w, 3) arrays or tensors.
            text: instruction ("action", "pose") or object name ("box"); not used by "depth" and "camera".
            state: (state_dim,) or (k, state_dim) with k <= state_history, oldest first, robot units. A shorter
                history is filled up with its oldest state: the arm stood still before the episode began.
            embodiment: key of norm_stats.
            objective: "action", "pose", "box", "depth" or "camera".
            actions: (n, action_dim), n <= chunk_size, robot units.
            action_mask: (n,) bool, all valid if None. Steps that are not valid keep their values: a data set's padding
                holds still.
            keyframe_pose: (pose_dim,) robot units. keyframe_symmetry: how many poses in a whole turn of the tool about
                its axis are as right, a multiple of turn_symmetry: of a cube in two fingers 4; None = turn_symmetry.
            boxes: (2, 4) of the left and the right view, x_min, y_min, x_max, y_max in px. A model without a right view
                is not asked for the second, and takes (4,) too.
            points_px: (2,) or (n, 2) (u, v) in px of the left view that a depth question asks about. depths_m: (n,)
                answers.
            calibration: mapping with focal_length_px, principal_point_px, baseline_m, transform_camera_to_base.
            depth_map: (h, w) of the left view, float in m or integer in depth_unit_m, 0 = unknown.
            target_px, gripper_px, destination_px: (2,) px of the left view, of the target, of the gripper and of where
                the target is to be put; None or NaN where it is not visible.
            target_name: what the instruction calls the target ("action", "pose"), for asked_words.
            names: list of K names of objects in the picture, for naming_loss. names_px: (K, 2) px of the left view,
                where these are.
            return_labels: write the answers and `labels`; an answer that is missing is an error.
            padding_side: default "right" with return_labels, else "left".
            check_stereo: overrides the processor's own setting; never done with return_labels unless asked for here.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: bad input; the message names the argument, its value and what is allowed. StereoPairError (a
                ValueError) for views that are swapped, unrectified or the same.
        """
        views, batched = self._views_of(images)
        given = {name: value for name, value in locals().items() if name in PER_SAMPLE}
        samples = split_batch(given, len(views), batched, self.sets_of_views)
        if check_stereo and "right" not in self.pixel_views:
            raise ValueError(f"check_stereo=True needs a right view; this model's views are {list(self.pixel_views)}")
        checked = (self.check_stereo and not return_labels) if check_stereo is None else check_stereo
        if checked and "right" in self.pixel_views:
            right = self.pixel_views.index("right")
            for number, found in enumerate(views):
                check_stereo_pair(found[0], found[right], name=f"images[{number}]" if batched else "images")
        pictures, geometries = self.image_processor.prepare(views)
        marked = POINTS_PX[:2] if destination_px is None else POINTS_PX
        outputs = {"points": marked if any(given[name] is not None for name in marked) else ()}
        outputs |= {"actions": return_labels or actions is not None}
        normalizer, reader, tokens = self.normalizer, self.reader, self.tokens
        rows = []
        for number, (sample, found, geometry) in enumerate(zip(samples, views, geometries, strict=True)):
            try:
                rows.append(self._read(sample, geometry, return_labels, outputs, normalizer, reader, tokens.form))
                if sample["depth_map"] is not None:
                    rows[-1]["depth_map"] = self._read_depth(sample, found, reader)
            except ValueError as error:
                if not batched:
                    raise
                raise ValueError(f"sample {number}: {error}") from error

        names = [sample["embodiment"] for sample in samples]
        shape = (self.state_history, self.state_dim)
        states = normalizer.normalize_batch([row.get("states") for row in rows], names, "state", shape)
        asked = [
            self._written(row["pose"], name) if "pose" in row and row["objective"] in self.pose_answers else None
            for row, name in zip(rows, names, strict=True)
        ]
        poses = normalizer.normalize_batch(asked, names, "keyframe_pose", (self.pose_dim,))
        sequences = self._sequences(tokens, rows, views, states, poses, return_labels)
        data = {"pixel_values": self.image_processor.to_pixel_values(pictures), "state": states.astype(np.float32)}
        if self.turn_symmetry and (return_labels or any(row["objective"] == "action" for row in rows)):
            data["facing"] = self._facing(rows, names)
        data |= tokens.pad(sequences, padding_side or ("right" if return_labels else "left"))
        maps = None if depth_map is None else [row.get("depth_map") for row in rows]
        data |= self._own_inputs(rows, views, data, maps, return_labels)
        if self.points_frame is not None:
            data |= self._point_transforms(samples, geometries, normalizer)
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
        if outputs["points"]:
            data["points"] = np.stack([row["points"] for row in rows]).astype(np.float32)
            if return_labels and self.pose_dim == self.state_dim:
                data |= self._displacements(rows, names, normalizer)
        if given["names"] is not None:
            data |= self._names(rows, tokens)
        tensors = {name: torch.as_tensor(value) for name, value in data.items()}
        return BatchFeature({k: v.numpy() for k, v in tensors.items()} if return_tensors == "np" else tensors)

    def _read(
        self,
        sample: dict[str, Any],
        geometry: ViewGeometry,
        with_answer: bool,
        outputs: dict[str, Any],
        normalizer: Normalizer,
        reader: SampleReader,
        form: str,
    ) -> dict[str, Any]:
        """Checked values of one sample: "objective", "prompt", and what the objective needs of "states", "pose", ..."""
        objective = sample["objective"]
        row: dict[str, Any] = {"objective": objective}
        if objective in ("action", "pose"):
            row["prompt"] = self._action_prompt(objective, reader.text(sample), form)
            row["asked_text"] = sample["target_name"]
            row["states"] = reader.states(sample)
            normalizer.statistics(sample["embodiment"], "state")  # an unknown embodiment is this sample's error
            if with_answer and (objective in self.pose_answers or sample["keyframe_pose"] is not None):
                row["pose"] = reader.pose(sample)
                if self.turn_symmetry and sample["keyframe_symmetry"] is not None:
                    row["equal_turns"] = reader.symmetry(sample, self.turn_symmetry)
            if outputs["actions"] and objective == "action":
                required(sample, "actions")
                row["actions"] = reader.actions(sample)
        elif objective == "box":
            row["asked_text"] = reader.text(sample)
            row["prompt"] = box_prompt(row["asked_text"], form)
            if with_answer:
                row["boxes"] = reader.boxes(sample, geometry)
        elif objective == "depth":
            points = row["asked"] = reader.question_points(sample, geometry)
            row["asked_text"] = points_text(points)
            row["prompt"] = depth_prompt(points, form)
            if with_answer:
                row["answer"] = value_text(reader.depths(sample, len(points)), self.depth_decimals)
        else:
            row["prompt"] = camera_prompt(form)
            if "right" not in self.pixel_views:
                raise ValueError(
                    "objective 'camera' asks for the baseline of the pair 'left', 'right'; this model sees the views "
                    f"{list(self.pixel_views)}; it answers {[name for name in OBJECTIVES if name != 'camera']}"
                )
            if with_answer:
                row["answer"] = reader.camera(sample, geometry).text()
        if outputs["points"]:
            row["points"] = reader.view_points(sample, outputs["points"], geometry)
        if sample["names"] is not None:
            row["names"] = reader.names(sample, geometry)
        return row

    def _names(self, rows: list[dict[str, Any]], tokens: PromptTokens) -> dict[str, np.ndarray]:
        """names int64 (B, K, L), name_points float32 (B, K, 2), see the class."""
        ids: list[list[list[int]]] = []
        for row in rows:
            texts, _ = row.get("names", ((), None))
            prompts = [box_prompt(text, tokens.form) for text in texts]  # as they stand within a sentence
            places = [tokens.places_of(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
            ids.append([one[place] for one, place in zip(tokens.encode(prompts), places, strict=True)])
        most, longest = max(map(len, ids)), max((len(name) for names in ids for name in names), default=0)
        out = np.full((len(rows), most, longest), IGNORE_INDEX, dtype=np.int64)
        points = np.full((len(rows), most, 2), np.nan, dtype=np.float32)
        for number, (row, names) in enumerate(zip(rows, ids, strict=True)):
            for place, name in enumerate(names):
                out[number, place, : len(name)] = name
            if names:
                points[number, : len(names)] = row["names"][1]
        return {"names": out, "name_points": points}

    def _facing(self, rows: list[dict[str, Any]], names: list[str]) -> np.ndarray:
        """float32 (B, num_turns), see the class."""
        out = np.zeros((len(rows), self.num_turns), dtype=np.float32)
        for number, (row, name) in enumerate(zip(rows, names, strict=True)):
            if "states" in row:
                yaws = [group[-1] for group in self.rotations(name)]
                out[number, : len(yaws)] = row["states"][-1][yaws]
        return out

    def _written(self, pose: np.ndarray, embodiment: str) -> np.ndarray:
        """A keyframe as it is written: of those that hold alike always the same."""
        if not self.turn_symmetry or self.pose_dim != self.state_dim:
            return pose
        return written_alike(pose, self.rotations(embodiment), self.turn_symmetry)

    def _displacements(
        self, rows: list[dict[str, Any]], names: list[str], normalizer: Normalizer
    ) -> dict[str, np.ndarray]:
        """displacement float32 (B, state_dim), and with `turn_symmetry` turns and equal_turns, see the class; NaN
        without a keyframe.
        """
        ways = np.full((len(rows), self.state_dim), np.nan, dtype=np.float32)
        turns = np.full((len(rows), self.num_turns), np.nan, dtype=np.float32)
        equal = np.full(len(rows), max(1, self.turn_symmetry), dtype=np.float32)
        known = [number for number, row in enumerate(rows) if "pose" in row]
        for name in sorted({names[number] for number in known}):
            # all of an embodiment at once: one by one they take a third of the time of a batch
            chosen = [number for number in known if names[number] == name]
            rotations = self.rotations(name)
            ends = (np.stack([rows[n]["pose"] for n in chosen]), np.stack([rows[n]["states"][-1] for n in chosen]))
            if self.turn_symmetry:
                way, turns[chosen, : len(rotations)] = differences_and_turns(*ends, rotations)
            else:
                way = differences(*ends, rotations)
            ways[chosen] = normalizer.scale(way, name, "state", rotations)
        for number in known:
            equal[number] = rows[number].get("equal_turns", equal[number])
        apart = {"turns": turns, "equal_turns": equal} if self.turn_symmetry else {}
        return {"displacement": ways, **apart}

    def _point_transforms(
        self, samples: list[dict[str, Any]], geometries: list[ViewGeometry], normalizer: Normalizer
    ) -> dict[str, np.ndarray]:
        """point_transform float32 (B, 4, 4) and point_frame int64 (B,), see `point_transforms`."""
        transforms, frames = [], []
        for sample, geometry in zip(samples, geometries, strict=True):
            given = sample["calibration"]
            camera = None if given is None else geometry.calibration(Calibration.from_mapping(given))
            name, scale, shift = sample["embodiment"], None, None
            if name is not None and begins_with_position(self.state_names, name, self.state_dim):
                to = normalizer.scaling(name, "state")
                scale, shift = to.scale[:3], (to.shift - to.scale * normalizer.base)[:3]
            transform, frame = point_transform(camera, self.points_frame, scale, shift)
            transforms.append(transform)
            frames.append(frame)
        return {"point_transform": np.stack(transforms).astype(np.float32), "point_frame": np.array(frames)}

    def tool_px(self, state: Any, calibration: Any, embodiment: str, source_size: tuple[int, int]) -> np.ndarray:
        """float64 (2,) px (u, v) of the processed left view, where the calibration says that the tool is; NaN where it
        is not in view, or where calibration or state do not say.

        Args:
            state: (state_dim,) or (k, state_dim), the present one last, robot units. source_size: (height, width) px.
        """
        nowhere = np.full(2, np.nan)
        if calibration is None or not begins_with_position(self.state_names, embodiment, self.state_dim):
            return nowhere
        geometry = self.image_processor.geometry(source_size)
        camera = geometry.calibration(Calibration.from_mapping(calibration))
        if camera.transform_camera_to_base is None:
            return nowhere
        present = np.asarray(state, dtype=np.float64).reshape(-1, self.state_dim)[-1]
        pixel = project_points(present[:3], camera)
        return pixel if geometry.shows(pixel) else nowhere

    def _sequences(
        self,
        tokens: PromptTokens,
        rows: list[dict[str, Any]],
        views: list[tuple[np.ndarray | None, ...]],
        states: np.ndarray,
        poses: np.ndarray,
        with_answer: bool,
    ) -> list[tuple[list[int], int, int]]:
        """`_sequence` of every sample; all texts are tokenized at once."""
        bins = tokens.bins
        answered = [number for number, row in enumerate(rows) if "answer" in row]
        texts = tokens.encode([row["prompt"] for row in rows] + [rows[number]["answer"] for number in answered])
        answers = dict(zip(answered, texts[len(rows) :], strict=True))
        state_ids, pose_ids = bins.encode(states.reshape(len(rows), -1)).tolist(), bins.encode(poses).tolist()
        sequences = []
        for number, (row, found) in enumerate(zip(rows, views, strict=True)):
            if row["objective"] in self.pose_answers:
                answer = pose_ids[number]
            elif "boxes" in row:
                answer = bins.encode_boxes(row["boxes"], self.image_processor.target_size).reshape(-1).tolist()
            else:
                answer = answers.get(number, [])
            ids = texts[number], state_ids[number], answer
            sequences.append(self._sequence(tokens, row["objective"], found, ids, with_answer))
        return sequences

    def decode_actions(self, chunk: Any, embodiment: str | Sequence[str]) -> np.ndarray:
        """Normalised chunk (B, n, action_dim), tensor or array -> float32 (B, n, action_dim) in robot units.

        `embodiment` is one for all, or one per sample. The gripper command stays a number: < -0.5 closes, > 0.5
        opens, anything between keeps.
        """
        return self._decoded(chunk, embodiment, "action", ndim=3)

    def encode_running_actions(self, actions: Sequence[Any], embodiment: str | Sequence[str]) -> torch.Tensor:
        """What is left of running chunks, one (n, action_dim) in robot units for each sample, 0 < n <= chunk_size ->
        float32 (B, chunk_size, action_dim), normalised, NaN behind them, as `predict_action` takes it.
        """
        names = [embodiment] * len(actions) if isinstance(embodiment, str) else list(embodiment)
        if len(names) != len(actions):
            raise ValueError(f"{len(names)} embodiments for a batch of {len(actions)}")
        steps, held = np.arange(self.chunk_size), []
        for number, given in enumerate(actions):
            chunk = np.asarray(given, dtype=np.float64)
            if chunk.ndim != 2 or chunk.shape[1] != self.action_dim or not 0 < len(chunk) <= self.chunk_size:
                raise ValueError(
                    f"running_actions of sample {number} has shape {chunk.shape}; expected (n, {self.action_dim}), n "
                    f"from 1 to {self.chunk_size}"
                )
            held.append(chunk[np.minimum(steps, len(chunk) - 1)])
        values = self.normalizer.normalize_batch(held, names, "action", (self.chunk_size, self.action_dim))
        for row, given in zip(values, actions, strict=True):
            row[len(given) :] = np.nan
        return torch.from_numpy(values.astype(np.float32))

    def decode_poses(self, ids: Any, embodiment: str | Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Generated pose ids (B, pose_dim, or more) -> (float32 (B, pose_dim) in robot units, valid bool (B,)).

        A pose is not valid if one of its ids is no bin; such ids count as -1 or 1, as in the released model.
        """
        ids = _array(ids)[..., : self.pose_dim]
        poses = self._decoded(self.bins.decode(ids), embodiment, "keyframe_pose", ndim=2)
        return poses, self.bins.is_bin(ids).all(axis=-1)

    def decode_boxes(self, ids: Any, source_size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Generated box ids (B, 8) -> (boxes float32 (B, 2, 4), left view first, in px; valid bool (B,)). Of a model
        without a right view (B, 4) -> (B, 1, 4).

        Pixels are those of source views of `source_size` (height, width), or of the processed view if it is None. Not
        valid: an id that is no bin, or a box without area.
        """
        count = 2 if "right" in self.pixel_views else 1
        ids = _array(ids)[..., : 4 * count].reshape(-1, count, 4)
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
