"""StereoProcessor: samples in, StereoVLA's inputs out; its outputs back to robot units."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .answers import action_prompt
from .image_processing_stereovla import as_pairs, as_views
from .policy_processor import PolicyProcessor
from .prompt_tokens import IGNORE_INDEX, PromptTokens
from .sample_values import SampleReader


class StereoProcessor(PolicyProcessor):
    """Turns samples into model inputs and model outputs into robot units.

    `images` is a pair [left, right] of equal size, or a list of pairs. `depth_map` needs calibration.

    Model inputs (`__call__`), for a batch of B (a single sample gives B = 1):

    - pixel_values float32 (B, 2, 3, H, W): RGB in [0, 1], left view first.
    - input_ids int64 (B, L): BOS, image token x num_visual_tokens, text, and for "action" and "pose" the ids of the
      past states, of the current state, and with `return_labels` of the keyframe pose and EOS.
    - attention_mask int64 (B, L): 1 = token, 0 = padding.
    - labels int64 (B, L), with `return_labels` only: -100 = no loss; not shifted.
    - state float32 (B, state_history, state_dim): normalised, oldest first; zeros for "box", "depth" and "camera".
    - facing float32 (B, num_turns), with `turn_symmetry` for "action" and `return_labels`: where the tool faces now,
      the yaw in rad of each rotation of the state; zeros where there is none.
    - actions float32 (B, chunk_size, action_dim): normalised; zeros after the steps that were given. action_mask bool
      (B, chunk_size): valid steps. is_action bool (B,): sample has an action loss. With `actions` or `return_labels`.
    - disparity float32 (B, H, W), with `depth_map` only: px of the processed left view, 0 = unknown.
    - point_transform float32 (B, 4, 4), point_frame int64 (B,), with `points_frame` only: what makes points of the
      processed left view's pixels and disparities (`point_transforms.point_transform`); zeros for a sample without
      calibration.
    - points float32 (B, P, 2), with `target_px`, `gripper_px` or `destination_px` only: (u, v) of target, gripper and,
      where the last is given, destination in px of the processed left view, NaN = not in it.
    - names int64 (B, K, L) and name_points float32 (B, K, 2), with `names` only: ids of each object's name, -100 = no
      further one, and (u, v) of the object in px of the processed left view, NaN = not in it, or no further object.
    - displacement float32 (B, pose_dim), with points and `return_labels`, where pose_dim equals state_dim: the way from
      the present state to the keyframe (`state_entries.differences`; of rotations a rotation vector), divided by the
      state's scales, the three parts of a rotation by the largest of theirs; NaN where the sample has no keyframe.
    - turns float32 (B, num_turns), beside displacement where `turn_symmetry` is not 0: for each rotation of the state
      the turn of the tool about its own axis, rad, which displacement then has not
      (`state_entries.differences_and_turns`); NaN = none. equal_turns float32 (B,): how many turns in a whole one are
      as right.
    - answer_points float32 (B, L, 2), with `return_labels` only: (u, v) in px of the processed left view that each
      label is about. Of a box and of a pose (but not of the present state before it) the target, of a depth question
      the pixel that it asks about; NaN where that is not visible or not given, and for labels about nothing, or about
      several pixels.
    - asked_words bool (B, L), with `return_labels` only: the ids that say what is asked for. Of a box the
      object's name, of an action or a pose `target_name` where the instruction has it, of a depth question its pixels.

    Objectives and their answers:

    - "action": keyframe pose and EOS as tokens, and the chunk `actions`. "pose": the same without `actions`. Labels:
      current state, pose and EOS; not the past states (as the released model was trained).
    - "box": 4 bins for the left and 4 for the right view (x_min, y_min, x_max, y_max), without EOS.
    - "depth": depths in m at pixels of the processed left view, as text, and EOS.
    - "camera": `answers.CameraParameters` of the processed left view, as text, and EOS.
    """

    pose_answers = ("action", "pose")
    sets_of_views = "image pairs"

    @property
    def pixel_views(self) -> tuple[str, ...]:
        """Names of the views in the order of pixel_values."""
        return ("left", "right")

    @property
    def model_input_names(self) -> list[str]:
        """Names that inference needs."""
        return ["pixel_values", "input_ids", "attention_mask", "state", *(["facing"] if self.turn_symmetry else [])]

    def _views_of(self, images: Any) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
        first = images[0] if isinstance(images, (list, tuple)) and images else images
        if isinstance(first, Mapping):
            return as_views(images, self.pixel_views, self.pixel_views)
        return as_pairs(images)

    def _action_prompt(self, objective: str, text: str, form: str) -> str:
        return action_prompt(text, form)

    def _read_depth(
        self, sample: dict[str, Any], views: tuple[np.ndarray, np.ndarray], reader: SampleReader
    ) -> tuple[np.ndarray, float]:
        return reader.depth_map(sample, self.image_processor.geometry(views[0].shape[:2]))

    def _sequence(
        self,
        tokens: PromptTokens,
        objective: str,
        views: tuple[np.ndarray, np.ndarray],
        ids: tuple[list[int], list[int], list[int]],
        with_answer: bool,
    ) -> tuple[list[int], int, int]:
        text, states, answer = ids
        eos = tokens.tokenizer.eos_token_id
        prompt = tokens.start + text
        if objective in self.pose_answers:
            prompt += states
            first = len(prompt) - self.state_dim
            return (prompt + [*answer, eos], first, 0) if with_answer else (prompt, first, self.pose_dim + 1)
        if not with_answer:
            return prompt, len(prompt), 0
        return prompt + (answer if objective == "box" else [*answer, eos]), len(prompt), 0

    def _own_inputs(
        self,
        rows: list[dict[str, Any]],
        views: list[tuple[np.ndarray, np.ndarray]],
        data: dict[str, np.ndarray],
        maps: list[tuple[np.ndarray, float] | None] | None,
        with_answer: bool,
    ) -> dict[str, Any]:
        inputs = {} if maps is None else self._disparity(maps)
        if with_answer:
            inputs["answer_points"] = self._answer_points(rows, data["labels"])
            inputs["asked_words"] = self._asked_words(rows, data["input_ids"])
        return inputs

    def _asked_words(self, rows: list[dict[str, Any]], input_ids: np.ndarray) -> np.ndarray:
        """bool (B, L), see the class."""
        words, tokens = np.zeros(input_ids.shape, dtype=bool), self.tokens
        for number, row in enumerate(rows):
            if (asked := row.get("asked_text")) and asked in row["prompt"]:
                begin = np.flatnonzero(input_ids[number] == tokens.image_token_id)[-1] + 1
                places = np.arange(words.shape[1])[begin:][tokens.places_of(asked, row["prompt"])]
                if row["objective"] == "depth":  # the numbers of "(16, 21)"
                    names = tokens.tokenizer.convert_ids_to_tokens(input_ids[number, places].tolist())
                    places = places[[any(letter.isdigit() for letter in name) for name in names]]
                words[number, places] = True
        return words

    def _answer_points(self, rows: list[dict[str, Any]], labels: np.ndarray) -> np.ndarray:
        """float32 (B, L, 2), see the class."""
        points = np.full((*labels.shape, 2), np.nan, dtype=np.float32)
        for number, row in enumerate(rows):
            places = np.flatnonzero(labels[number] != IGNORE_INDEX)
            if row["objective"] in self.pose_answers:
                places = places[self.state_dim :]  # the present state is no question
            about = row.get("asked", row.get("points", ())[:1])  # pixels of a depth question, or the target
            if len(about) == 1:
                points[number, places] = about[0]
        return points

    def _disparity(self, maps: list[tuple[np.ndarray, float] | None]) -> dict[str, torch.Tensor]:
        """Of depth maps of the processed views, each with p = disparity * depth, px, 0 = unknown."""
        depth = np.zeros((len(maps), *self.image_processor.target_size), dtype=np.float32)
        product = torch.zeros(len(maps), 1, 1)
        for row, entry in enumerate(maps):
            if entry is not None:
                depth[row], product[row] = entry
        depth = torch.from_numpy(depth)
        # 0, negative and NaN are unknown, infinity gives 0
        return {"disparity": torch.where(depth > 0, product / depth, 0.0)}
