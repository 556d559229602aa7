"""DepthVLAProcessor: samples in, DepthVLA's inputs out; its outputs back to robot units."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .answers import action_prompt
from .image_processing_stereovla import as_views
from .policy_processor import PolicyProcessor
from .prompt_tokens import IGNORE_INDEX, PromptTokens
from .sample_values import SampleReader

MAIN_VIEW, RIGHT = "left", "right"


class DepthVLAProcessor(PolicyProcessor):
    """Turns samples into model inputs and model outputs into robot units.

    `images` is a dict {view: picture, None or nothing where it is absent}, or a list of dicts. One sample may also be a
    list of pictures in the order of `pixel_views`, or the picture itself where the model has one view. "left" must
    always be there, and "right" if it is a view. The two have equal size, others any. Every pixel of a question or an
    answer is one of the left view, if not said otherwise.

    Model inputs (`__call__`), for a batch of B (a single sample gives B = 1):

    - pixel_values float32 (B, P, 3, H, W): RGB in [0, 1], views in the order of `pixel_views`; zeros where one is
      absent.
    - view_mask bool (B, V): which of `views` are there.
    - input_ids int64 (B, L): image token x num_visual_tokens for each of `views` that is there, BOS, prompt, newline,
      as transformers' PI0Processor and PaliGemmaProcessor write them; with `return_labels` the answer and EOS. The
      prompt of "action" is the instruction itself, as in pi0, others are questions. No states: the model takes `state`.
    - token_type_ids int64 (B, L): 1 = answer (causal), 0 = the rest (sees all of the prompt).
    - attention_mask int64 (B, L): 1 = token, 0 = padding.
    - labels int64 (B, L), with `return_labels` only: the answer and EOS, -100 = no loss; not shifted.
    - state float32 (B, state_history, state_dim): normalised, oldest first; zeros for "box", "depth" and "camera".
    - facing float32 (B, num_turns), with `turn_symmetry` for "action" and `return_labels`: where the tool faces now,
      the yaw in rad of each rotation of the state; zeros where there is none.
    - actions float32 (B, chunk_size, action_dim): normalised; zeros after the steps that were given. action_mask bool
      (B, chunk_size): valid steps. is_action bool (B,): sample has an action loss. With `actions` or `return_labels`.
    - depth_map float32 (B, V, H, W), with `depth_map` only: planar depth in m of the processed views, 0 = unknown. It
      is given as a dict {view: (h, w)}, or as the left view's (h, w).
    - points float32 (B, P, 2), with `target_px`, `gripper_px` or `destination_px` only: (u, v) of target, gripper and,
      where the last is given, destination in px of the processed left view, NaN = not in it.
    - names int64 (B, K, L) and name_points float32 (B, K, 2), with `names` only: ids of each object's name, -100 = no
      further one, and (u, v) of the object in px of the processed left view, NaN = not in it, or no further object.
    - displacement float32 (B, pose_dim), with points and `return_labels`, where pose_dim equals state_dim: as of
      StereoProcessor; NaN where the sample has no keyframe.
    - turns float32 (B, num_turns), beside displacement where `turn_symmetry` is not 0: for each rotation of the state
      the turn of the tool about its own axis, rad, which displacement then has not
      (`state_entries.differences_and_turns`); NaN = none. equal_turns float32 (B,): how many turns in a whole one are
      as right.

    Objectives and their answers:

    - "action": the chunk `actions`, and no answer in words. "pose": the keyframe pose as bins.
    - "box": 4 bins of the left view (x_min, y_min, x_max, y_max), and 4 of the right view where it is a view.
    - "depth": depths in m at pixels of the processed left view, as text.
    - "camera": `answers.CameraParameters` of the processed left view, as text; refused without a right view.
    """

    images_first = True

    def __init__(
        self,
        image_processor,
        tokenizer,
        norm_stats: dict[str, Any] | None = None,
        normalization: str = "quantiles",
        control_rates_hz: dict[str, float] | None = None,
        chunk_size: int = 8,
        state_history: int = 1,
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
        views: Sequence[str] = (MAIN_VIEW,),
        stereo: bool = False,
    ):
        """Options as those of `ProcessorOptions`; transformers saves and loads what stands in this very signature.

        Args:
            views: names of the cameras that the language model and the depth expert see; "left" is the first.
            stereo: whether the depth expert sees the pair "left", "right"; "right" is then the last of `pixel_views`,
                and not one of `views`.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.views, self.stereo = options.pop("views"), options.pop("stereo")
        super().__init__(**options)

    def _check(self) -> None:
        self._check_views()
        self.views = list(self.views)
        super()._check()

    def _check_views(self) -> None:
        if isinstance(self.views, str) or not all(isinstance(name, str) and name for name in self.views):
            raise ValueError(f"views is {self.views!r}; expected a list of names such as ['left', 'wrist']")
        views = list(self.views)
        if views[:1] != [MAIN_VIEW] or len(set(views)) != len(views):
            raise ValueError(f"views are {views}; the first must be {MAIN_VIEW!r}, and every name be there once")
        if not isinstance(self.stereo, bool):
            raise ValueError(f"stereo is {self.stereo!r}; expected True or False")
        if self.stereo and RIGHT in views:
            raise ValueError(f"views are {views} and stereo is True; {RIGHT!r} is then the depth expert's, not a view")

    @property
    def pixel_views(self) -> tuple[str, ...]:
        """Names of the views in the order of pixel_values: `views`, and "right" where only the depth expert sees it."""
        return (*self.views, *([RIGHT] if self.stereo else []))

    @property
    def model_input_names(self) -> list[str]:
        """Names that inference needs."""
        names = ["pixel_values", "view_mask", "input_ids", "token_type_ids", "attention_mask", "state"]
        return [*names, *(["facing"] if self.turn_symmetry else [])]

    def _views_of(self, images: Any) -> tuple[list[tuple[np.ndarray | None, ...]], bool]:
        self._check_views()
        names = self.pixel_views
        return as_views(images, names, [name for name in names if name in (MAIN_VIEW, RIGHT)])

    def _action_prompt(self, objective: str, text: str, form: str) -> str:
        return form.format(text) if objective == "action" else action_prompt(text, form)

    def _read_depth(
        self, sample: dict[str, Any], views: tuple[np.ndarray | None, ...], reader: SampleReader
    ) -> dict[str, np.ndarray]:
        seen = zip(self.views, views[: len(self.views)], strict=True)
        geometries = {name: self.image_processor.geometry(view.shape[:2]) for name, view in seen if view is not None}
        return reader.depth_maps(sample, geometries)

    def _sequence(
        self,
        tokens: PromptTokens,
        objective: str,
        views: tuple[np.ndarray | None, ...],
        ids: tuple[list[int], list[int], list[int]],
        with_answer: bool,
    ) -> tuple[list[int], int, int]:
        text, _, answer = ids
        prompt = tokens.start_of(sum(view is not None for view in views[: len(self.views)])) + text
        if objective == "action":
            return prompt, len(prompt), 0
        if with_answer:
            return [*prompt, *answer, tokens.tokenizer.eos_token_id], len(prompt), 0
        # with its EOS; how long an answer in words becomes is not known
        numbers = {"pose": self.pose_dim, "box": 8 if RIGHT in self.pixel_views else 4}
        return prompt, len(prompt), numbers[objective] + 1 if objective in numbers else 0

    def _own_inputs(
        self,
        rows: list[dict[str, Any]],
        views: list[tuple[np.ndarray | None, ...]],
        data: dict[str, np.ndarray],
        maps: list[dict[str, np.ndarray] | None] | None,
        with_answer: bool,
    ) -> dict[str, Any]:
        present = [[view is not None for view in found[: len(self.views)]] for found in views]
        inputs = {"view_mask": np.array(present), "token_type_ids": (data["labels"] != IGNORE_INDEX).astype(np.int64)}
        if maps is not None:
            depth = np.zeros((len(maps), len(self.views), *self.image_processor.target_size), dtype=np.float32)
            for row, of_views in enumerate(maps):
                for name, processed in (of_views or {}).items():
                    depth[row, self.views.index(name)] = processed
            inputs["depth_map"] = depth
        return inputs
