"""A vision-language-action model as a policy, loaded through the Auto classes."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from stereovla.evaluation.policies import Observation, Policy
from stereovla.evaluation.shown_geometry import shown
from stereovla.serving.calibration_watch import watch_of
from stereovla.sources import (
    adapted_model,
    check_checkpoint,
    check_interface,
    load_checkpoint,
    load_processor,
    source_of,
)


def load_untrained(source: str, seed: int = 0, device: str = "cpu", run_code: bool = False) -> tuple[Any, Any]:
    """A model of the same config with fresh weights drawn from `seed`, and the checkpoint's own processor. Of an
    adapter: the model that it changes, with fresh heads where its robot has other sizes; `run_code` as in
    `sources.load_checkpoint`.
    """
    check_checkpoint(source, weights=False)
    if adapted_model(source) is not None:
        model, processor = load_checkpoint(source, device, run_code, adapted=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model.resize_heads(processor.state_dim, processor.action_dim), processor
    with source_of(source, "checkpoint"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    processor = load_processor(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, trust_remote_code=True)
    check_interface(source, config=config, model=model, processor=processor)
    return model.to(device).eval(), processor


class ModelPolicy(Policy):
    """A model and its processor. The noise that a chunk starts from is a function of (seed, step) alone.

    Args:
        num_steps: Euler steps; None = the model's own.
        shown: what its geometry is shown, one of `shown_geometry.SHOWN`; "swapped" needs `Observation.another`.
        check_stereo: look for swapped or unrectified views; off for pictures that a simulator has drawn (4 ms a pair).
    """

    needs_images = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        num_steps: int | None = None,
        shown: str = "given",
        check_stereo: bool = False,
    ):
        self.model, self.processor, self.name = model, processor, name
        self.num_steps, self.shown, self.check_stereo = num_steps, shown, check_stereo
        self.watch = watch_of(model, processor)

    def inputs(self, observations: Sequence[Observation]) -> Any:
        """The processor's batch for an action."""
        history = self.model.config.state_history
        return self.processor(
            images=self.images([o.all_views for o in observations]),
            text=[o.instruction for o in observations],
            state=[o.states[-history:] for o in observations],
            embodiment=[o.embodiment for o in observations],
            objective="action",
            check_stereo=self.check_stereo,
            **self.shown_beside(observations),
        ).to(self.model.device)

    def shown_beside(self, seen: Sequence[Any]) -> dict[str, Any]:
        """What the model is shown beside pictures, of observations or held-out rows, which have `depths` and
        `calibration`.
        """
        beside: dict[str, Any] = {}
        if self.model.config.reads_depth:
            beside["depth_map"] = self.depth_maps([one.depths for one in seen])
        if getattr(self.processor, "points_frame", None) is not None or ("depth_map" in beside and self.is_stereovla):
            beside["calibration"] = [one.calibration for one in seen]
            if None in beside["calibration"] and not self.model.config.calibration_dropout:
                raise ValueError(
                    f"{self.name} sees points, which need the calibration of every pair: it was trained with "
                    "calibration_dropout 0, so it never saw a pair without"
                )
        return beside

    def images(self, views: Sequence[Mapping[str, np.ndarray | None]]) -> list[Any]:
        """Views by name, None where one is absent, as the processor takes them; those that the model does not see are
        left out. ValueError where it must see others, which nobody shows it here.
        """
        names = self.processor.pixel_views
        if unknown := [name for name in names if any(name not in of for of in views)]:
            raise ValueError(
                f"{self.name} sees {', '.join(names)}, but there is no view {', '.join(unknown)} here; there are "
                f"{', '.join(views[0])}"
            )
        if self.is_stereovla:  # folders that were saved before take pairs alone
            return [[of[name] for name in names] for of in views]
        return [{name: of[name] for name in names} for of in views]

    def depth_maps(self, depths: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Those of the views that the language model and the depth expert see; of a StereoVLA the left view's."""
        if self.is_stereovla:
            return [of["left"] for of in depths]
        return [{name: of[name] for name in self.model.config.views if name in of} for of in depths]

    @property
    def is_stereovla(self) -> bool:
        """Whether it is a StereoVLA, which sees a pair, rather than views by name."""
        return self.model.config.model_type == "stereovla"

    @property
    def needs_depth(self) -> bool:
        """Whether it is shown true depth."""
        return self.model.config.reads_depth

    def act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        chunks: dict[int, np.ndarray] = {}
        for rows in self._continued_alike(observations):
            chunks |= dict(zip(rows, self._act([observations[row] for row in rows]), strict=True))
        return [chunks[row] for row in range(len(observations))]

    def _continued_alike(self, observations: Sequence[Observation]) -> list[list[int]]:
        """Rows of those that continue no chunk, of those that are given one, and of those that are guided by one."""
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for row, o in enumerate(observations):
            given = o.delay <= self.model.config.max_delay
            kinds.setdefault((o.running_actions is None, given), []).append(row)
        return list(kinds.values())

    def _act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        noise, names = self.noise([(o.seed, o.step) for o in observations]), [o.embodiment for o in observations]
        running = {}
        if observations[0].running_actions is not None:
            actions = self.processor.encode_running_actions([o.running_actions for o in observations], names)
            delay = torch.tensor([o.delay for o in observations])
            running = {"running_actions": actions.to(self.model.device), "delay": delay.to(self.model.device)}
        with self._shown(observations) as inputs:
            chunks = self.model.predict_action(**inputs, noise=noise, num_steps=self.num_steps, **running)
        if self.watch is not None:
            self.watch.compare(
                [self.processor.tool_px(o.states, o.calibration, o.embodiment, o.left.shape[:2]) for o in observations]
            )
            if problem := self.watch.news():
                warnings.warn(f"{self.name}: {problem}", RuntimeWarning, stacklevel=2)
        return list(self.processor.decode_actions(chunks, names))

    def noise(self, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(B, chunk_size, action_dim) float32, row by row a function of its (seed, step)."""
        shape = (self.model.config.chunk_size, self.model.config.action_dim)
        rows = [np.random.default_rng(key).standard_normal(shape, dtype=np.float32) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(self.model.device)

    @torch.inference_mode()
    def disparity(self, observations: Sequence[Observation]) -> np.ndarray | None:
        """(B, h, w) float32, at a half or a quarter of the resolution: the disparity that the model sees, in px of the
        processed left view; None if it has none.
        """
        if not self.is_stereovla or self.model.config.stereo_config is None:
            return None
        with self._shown(observations) as inputs:
            return self.model(**inputs, output_disparity=True).disparity.float().cpu().numpy()

    def _shown(self, observations: Sequence[Observation]) -> AbstractContextManager[dict[str, Any]]:
        """The inputs in which its geometry is shown what it shall be."""
        others = self.inputs([o.another for o in observations]) if self.shown == "swapped" else None
        return shown(self.model, self.shown, self.inputs(observations), others)
