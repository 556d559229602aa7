"""A vision-language-action model as a policy, loaded through the Auto classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from stereovla.evaluation.policies import Observation, Policy
from stereovla.sources import adapted_model, check_checkpoint, load_checkpoint, load_processor, source_of


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, trust_remote_code=True)
    return model.to(device).eval(), load_processor(source)


class ModelPolicy(Policy):
    """A model and its processor. The noise that a chunk starts from is a function of (seed, step) alone.

    Args:
        num_steps: Euler steps; None = the model's own.
        check_stereo: look for swapped or unrectified views; off for pictures that a simulator has drawn (4 ms a pair).
    """

    needs_images = True

    def __init__(self, model: Any, processor: Any, name: str, num_steps: int | None = None, check_stereo: bool = False):
        self.model, self.processor, self.name = model, processor, name
        self.num_steps, self.check_stereo = num_steps, check_stereo
        depth_config = getattr(model.config, "depth_config", None)
        self.needs_depth = depth_config is not None and depth_config.input == "depth"

    def inputs(self, observations: Sequence[Observation]) -> Any:
        """The processor's batch for an action."""
        history = self.model.config.state_history
        return self.processor(
            images=[self.views(o.left, o.right) for o in observations],
            depth_map=[o.depth for o in observations] if self.needs_depth else None,
            text=[o.instruction for o in observations],
            state=[o.states[-history:] for o in observations],
            embodiment=[o.embodiment for o in observations],
            objective="action",
            check_stereo=self.check_stereo,
        ).to(self.model.device)

    def views(self, left: np.ndarray, right: np.ndarray | None) -> list[np.ndarray] | dict[str, np.ndarray]:
        """Those of the two that the model sees, as its processor takes them; ValueError where it must see others, which
        nobody shows it here.
        """
        if not hasattr(self.processor, "views"):
            return [left, right]  # a pair, which folders of earlier versions take too
        given, names = {"left": left, "right": right}, self.processor.pixel_views
        if unknown := [name for name in names if given.get(name) is None]:
            raise ValueError(f"{self.name} sees {', '.join(names)}, but there is no view {', '.join(unknown)} here")
        return {name: given[name] for name in names}

    def act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        noise = self.noise([(o.seed, o.step) for o in observations])
        chunks = self.model.predict_action(**self.inputs(observations), noise=noise, num_steps=self.num_steps)
        return list(self.processor.decode_actions(chunks, [o.embodiment for o in observations]))

    def noise(self, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(B, chunk_size, action_dim) float32, row by row a function of its (seed, step)."""
        shape = (self.model.config.chunk_size, self.model.config.action_dim)
        rows = [np.random.default_rng(key).standard_normal(shape, dtype=np.float32) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(self.model.device)

    @torch.inference_mode()
    def disparity(self, observations: Sequence[Observation]) -> np.ndarray | None:
        """(B, H/4, W/4) float32: the disparity that the model sees, in px of the processed left view; None if it sees
        with one eye.
        """
        if not hasattr(self.model.config, "disparity_loss_weight") or self.model.config.stereo_config is None:
            return None
        return 4 * self.model(**self.inputs(observations), output_disparity=True).disparity[:, 0].float().cpu().numpy()
