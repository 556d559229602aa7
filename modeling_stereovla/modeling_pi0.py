"""transformers' own PI0 as a policy of ours: the same inputs, losses and chunks, so that it is trained and measured as
the others are. `PI0Policy.pi0` is what transformers publishes; a DepthVLA without depth expert computes the same.
"""

import inspect

import torch
from transformers import PI0ForConditionalGeneration

from .configuration_pi0 import PI0PolicyConfig, pi0_config
from .flow_matching import Draws
from .model_outputs import DepthVLAOutput, refuse_targets, refuse_unknown_inputs
from .modeling_depthvla import DepthVLAForActionPrediction
from .objectives import ActionObjective, Predictions, Targets, sum_losses
from .policy import PolicyForActionPrediction


class PI0Policy(PolicyForActionPrediction):
    """A `PI0ForConditionalGeneration` behind our processor. It has no pointers and writes nothing; untrained, its
    weights have the variances of those of our pi0.
    """

    config: PI0PolicyConfig
    config_class = PI0PolicyConfig
    base_model_prefix = "pi0"
    _no_split_modules = ["GemmaDecoderLayer", "SiglipEncoderLayer"]
    supports_gradient_checkpointing = False  # its expert reads a cache that a second pass would write twice
    parts = {
        "vision": "pi0.model.vlm.vision_tower",
        "projector": "pi0.model.vlm.multi_modal_projector",
        "language_model": "pi0.model.vlm.language_model",
        "action_expert": "pi0.model.dit",
    }
    towers = ("vision",)

    def __init__(self, config: PI0PolicyConfig):
        super().__init__(config)
        inner = pi0_config(config)
        inner._attn_implementation = config._attn_implementation
        self.pi0 = PI0ForConditionalGeneration(inner)
        for module in [*self.pi0.embed_action_time.modules(), self.pi0.action_out_proj]:
            self._init_weights(module)  # transformers' own range is for the full size; so begin those of our pi0
        self.pointers = None
        self.objectives = [ActionObjective(config)]
        self.frozen: tuple[str, ...] = ()
        self._held: list[torch.nn.Parameter] = []
        self.post_init()

    def get_input_embeddings(self):
        return self.pi0.get_input_embeddings()

    def resize_heads(self, state_dim: int, action_dim: int, num_turns: int | None = None) -> "PI0Policy":
        """This model; ValueError where a robot has more numbers than it has places."""
        for name, size in (("state_dim", state_dim), ("action_dim", action_dim)):
            if size != getattr(self.config, name):
                raise ValueError(
                    f"{name} is {size}, and this pi0 is for {getattr(self.config, name)}; it is trained for one robot: "
                    "begin with an untrained one"
                )
        return self

    def compile_predict_action(self, **options) -> None:
        """ValueError: transformers' PI0 looks at values on its way."""
        raise ValueError(
            "transformers' PI0 is not compiled as a whole; a DepthVLA without depth expert computes the same and is"
        )

    def _own_inputs(
        self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None, state: torch.Tensor, **others
    ) -> dict[str, torch.Tensor | None]:
        """What `pi0` calls them: pixels in [-1, 1], one state."""
        if view_mask is None:
            view_mask = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
        pixel_values = (2 * pixel_values - 1).to(self.dtype)
        return {"pixel_values": pixel_values, "pixel_attention_mask": view_mask, "state": state[:, -1], **others}

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        state: torch.Tensor,
        actions: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        is_action: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        counts: dict[str, torch.Tensor] | None = None,
        **unused,
    ) -> DepthVLAOutput:
        """The flow loss of the samples that act; `pi0` runs once for each of the `config.flow_draws`, as it takes one.

        Args: as in `DepthVLAForActionPrediction.forward`, of which others are taken and not used: this policy learns
            from actions alone.
        """
        others = inspect.signature(DepthVLAForActionPrediction.forward).parameters
        unknown = {name: value for name, value in unused.items() if name not in others}
        refuse_unknown_inputs(unknown, DepthVLAForActionPrediction.forward)
        targets = Targets(actions=actions, is_action=is_action, action_mask=action_mask)
        draws = Draws(noise, time, None).completed(self.config, actions, generator)
        rows = targets.acting
        if len(rows) == 0:  # of processes that share weights each waits for the others in the model
            rows = rows.new_zeros(1)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        view_mask = None if view_mask is None else view_mask[rows]
        inputs = self._own_inputs(
            pixel_values[rows], view_mask, state[rows], input_ids=input_ids[rows], attention_mask=mask[rows]
        )
        velocities = [
            self.pi0(
                **inputs, actions=actions[rows], noise=draws.noise[rows, draw], timestep=draws.time[rows, draw]
            ).logits
            for draw in range(self.config.flow_draws)
        ]
        predictions = Predictions(
            velocity=torch.stack(velocities, dim=1), flow=draws.noise[rows] - actions[rows][:, None]
        )
        nothing = torch.full((len(actions),), float("nan"), device=actions.device)
        return DepthVLAOutput(
            velocity=predictions.velocity[: len(targets.acting)],
            sample_language_loss=nothing,
            sample_token_accuracy=nothing,
            **sum_losses(self.objectives, predictions, targets, counts),
        )

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        state: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        num_steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        running_actions: torch.Tensor | None = None,
        delay: torch.Tensor | int | None = None,
        **unused,
    ) -> torch.Tensor:
        """Action chunks (B, chunk_size, action_dim), normalised, as of `DepthVLAForActionPrediction`; ValueError for
        `running_actions`, which transformers' PI0 cannot continue.
        """
        refuse_targets(unused)
        if running_actions is not None or delay is not None:
            raise ValueError(
                "running_actions and delay are given, but transformers' PI0 begins every chunk anew; a DepthVLA "
                "without depth expert computes the same and continues them"
            )
        noise = self._begin(input_ids, num_steps, noise, generator, None, None).noise
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = self._own_inputs(pixel_values, view_mask, state, input_ids=input_ids, attention_mask=mask)
        return self.pi0.sample_actions(**inputs, noise=noise.to(input_ids.device, self.dtype), num_steps=num_steps)


__all__ = ["PI0Policy"]
