"""DepthVLA (arXiv 2510.13375): a vision-language-action model with a depth expert, as a mixture of transformers."""

import torch
from torch import nn
from transformers import GenerationMixin, PaliGemmaModel
from transformers.cache_utils import Cache, DynamicCache

from .action_expert import Prefix
from .configuration_depthvla import DepthVLAConfig
from .depth_expert import DepthExpertModel
from .flow_matching import Draws
from .layer_caches import CACHE, RecordingCache
from .mixture_of_transformers import Rotary, joint_mask, run_layers, run_together
from .model_outputs import DepthVLAModelOutput, DepthVLAOutput, refuse_targets, refuse_unknown_inputs
from .objectives import Predictions, Targets, sum_losses
from .policy import Beginning, PolicyForActionPrediction, PolicyPreTrainedModel, next_positions
from .rotary_embedding import without_waiting
from .running_statistics import hold_running_statistics
from .saved_names import accept_saved_names
from .values import require, unless_all
from .visual_tokens import IMAGENET, PIXEL_STATISTICS, normalize_pixels, pool_to_grid


class DepthVLAPreTrainedModel(PolicyPreTrainedModel):
    config: DepthVLAConfig
    config_class = DepthVLAConfig
    _no_split_modules = ["GemmaDecoderLayer", "SiglipEncoderLayer", "Dinov2Layer", "CostFilter", "EdgeNeXtStage"]

    def post_init(self):
        super().post_init()  # which adds the names of the parts
        if self.config.mask == "full" and self.config.depth_config is not None:
            # layers of two transformers that run together cannot be gathered one by one (FSDP)
            self._no_split_modules.discard("GemmaDecoderLayer")


class DepthVLAModel(DepthVLAPreTrainedModel):
    """VLM and depth expert: what the action expert reads. The policy without its heads."""

    def __init__(self, config: DepthVLAConfig):
        super().__init__(config)
        self.vlm = PaliGemmaModel._from_config(config.vlm_config)
        without_waiting(self.vlm.language_model)
        for layer in self.vlm.language_model.layers:
            layer._can_checkpoint_with_cache = True  # of a training step: RecordingCache may be written twice
        self.vlm.register_load_state_dict_pre_hook(accept_saved_names)
        self.depth_expert = None if config.depth_config is None else DepthExpertModel._from_config(config.depth_config)
        # pointers read depth where they read the picture
        reads_depth = config.use_pointers and self.depth_expert is not None
        if reads_depth:
            cells = config.depth_config.merge_size**2  # of a depth token, each of which has a visual token
            self.depth_reading = nn.Linear(config.depth_config.hidden_size, cells * config.text_config.hidden_size)
        else:
            self.depth_reading = None
        self.mean, self.std = PIXEL_STATISTICS.get(config.vlm_config.vision_config.model_type, IMAGENET)
        self.post_init()

    def get_input_embeddings(self):
        return self.vlm.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.vlm.language_model.embed_tokens = value

    def embed_views(self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None) -> torch.Tensor:
        """Visual tokens (V', N, hidden) of the views that are there, those of a sample one behind the other, and what
        is behind them of no meaning.

        Args:
            pixel_values: (B, V, 3, H, W); view_mask: (B, V) bool, None = all are there.
        """
        if view_mask is None:
            views = pixel_values.flatten(0, 1)
        elif torch.compiler.is_compiling():  # a graph of fixed shapes looks at those that are absent too, at the end
            views = pixel_values.flatten(0, 1)[(~view_mask).flatten().byte().argsort(stable=True)]
        else:
            views = pixel_values[view_mask]
        tower = self.vlm.vision_tower
        if self.training:
            hold_running_statistics(tower)
        features = tower(pixel_values=normalize_pixels(views, self.mean, self.std)).last_hidden_state
        if features.ndim == 4:
            features = pool_to_grid(features, self.config.image_size // self.config.patch_size)
        return self.vlm.multi_modal_projector(features)

    def embed(
        self,
        input_ids: torch.Tensor | None,
        visual_tokens: torch.Tensor | None,
        embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings (B, L, hidden), those of `input_ids` unless given as `embeds`, in which the visual tokens
        take the places of the image token id.
        """
        if input_ids is None and (embeds is None or visual_tokens is not None):
            raise ValueError("input_ids is missing: beside inputs_embeds too it says where the visual tokens go")
        is_image = None if input_ids is None else input_ids == self.config.image_token_id
        if embeds is None:
            # the image token may lie behind the vocabulary, as PaliGemma's does in pi0
            embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if visual_tokens is None:
            return embeds
        return embeds.masked_scatter(is_image[..., None], visual_tokens.to(embeds.dtype))

    def check_images(
        self, input_ids: torch.Tensor | None, pixel_values: torch.Tensor, view_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`view_mask`, or None where all views are there; ValueError for other shapes, for a sample without its first
        view, and for one that has not a place for each of its visual tokens. Before anything is computed, when no
        device has to be waited for.
        """
        size, names = self.config.image_size, self.config.pixel_views
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[1:]) != (len(names), 3, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (batch, {len(names)}, 3, {size}, "
                f"{size}), the views being {', '.join(names)}"
            )
        if view_mask is not None:
            expected = (len(pixel_values), len(self.config.views))
            if tuple(view_mask.shape) != expected:
                raise ValueError(f"view_mask has shape {tuple(view_mask.shape)}; it must be {expected}, (batch, views)")
            view_mask = unless_all(view_mask.bool())
        if view_mask is not None:
            rule = f"view_mask leaves out {names[0]!r} of a sample; the first view must always be there"
            require(view_mask[:, 0], rule, lambda: rule)
        if input_ids is None:
            return view_mask  # `embed` says what it is needed for
        counts = (input_ids == self.config.image_token_id).sum(-1)
        needed = self.config.num_visual_tokens
        there = len(self.config.views) if view_mask is None else view_mask.sum(-1)
        require(
            counts == there * needed,
            f"each row of input_ids needs {needed} image tokens for each view that is there",
            lambda: (
                f"input_ids hold {counts.tolist()} image tokens (id {self.config.image_token_id}) in the rows of this "
                f"batch; each row needs {needed} for each view that is there: "
                f"{there if view_mask is None else there.tolist()}"
            ),
        )
        return view_mask

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        depth_map: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_depth: bool = False,
        output_prefix: bool = True,
    ) -> DepthVLAModelOutput:
        """
        Args:
            input_ids: (B, L) int64, with `config.num_visual_tokens` image tokens for each view that is there.
            pixel_values: (B, P, 3, H, W), RGB in [0, 1], in the order of `config.pixel_views`.
            view_mask: (B, V) bool, which of `config.views` are there; None = all.
            attention_mask: (B, L) or (B, cached + L), 1 = valid token.
            token_type_ids: (B, L), 0 = prompt, whose tokens see each other, 1 = answer; None = all prompt.
            depth_map: (B, V, H, W) in m, where the depth expert's input is depth.
            cache: keys and values of earlier tokens, and where those of these go; before transformers 5.24,
                past_key_values. With one the VLM runs alone: answers are about what it sees.
            output_depth: also return the predicted depth.
            output_prefix: False runs the VLM alone too, where the mask lets it: for answers in words.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        tokens = None
        if pixel_values is not None:
            view_mask = self.check_images(input_ids, pixel_values, view_mask)
            pixel_values = pixel_values.to(self.dtype)
            tokens = self.embed_views(pixel_values[:, : len(self.config.views)], view_mask)
        embeds = self.embed(input_ids, tokens, inputs_embeds)
        positions = next_positions(embeds, attention_mask, cache) if position_ids is None else position_ids
        rotary = self.vlm.language_model.rotary_emb(embeds, positions)
        joint = self.depth_expert is not None and self.config.mask == "full"
        if cache is not None and joint:
            raise ValueError(
                "mask is 'full': the VLM sees the depth expert's tokens, which answers from a cache do not; generate "
                "with use_cache=False"
            )
        if pixel_values is None or cache is not None or not (joint or output_prefix or output_depth):
            cached = 0 if cache is None else cache.get_seq_length()
            if attention_mask is not None:
                cached = attention_mask.shape[1] - embeds.shape[1]
            allowed = self._allowed(embeds, attention_mask, token_type_ids, cached)
            hidden = run_layers(self.vlm.language_model, embeds, cache, allowed, rotary)
            return DepthVLAModelOutput(last_hidden_state=hidden, **{CACHE: cache if use_cache else None})
        hidden, depth_hidden, prefix = self._run_experts(
            embeds, rotary, attention_mask, token_type_ids, (pixel_values, view_mask, depth_map)
        )
        visual = None
        if self.config.use_pointers:
            visual = self._first_view(tokens, view_mask)
            if self.depth_reading is not None:
                visual = visual + self._read_depth(depth_hidden)
        return DepthVLAModelOutput(
            last_hidden_state=hidden,
            prefix=prefix,
            visual_tokens=visual,
            log_depth=self.depth_expert.log_depth(depth_hidden) if output_depth else None,
        )

    def _allowed(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        cached: int = 0,
    ) -> torch.Tensor | None:
        """What VLM tokens (B, L, hidden) see of VLM tokens, bool (B, 1, L, cached + L); None = all. Behind `cached`
        tokens an answer goes on.
        """
        if cached:
            valid = valid_tokens(embeds, attention_mask, cached)
            return joint_mask(valid, torch.ones_like(valid))[:, :, cached:]
        attention_mask = unless_all(attention_mask)
        no_answer = token_type_ids is None or unless_all(token_type_ids == 0) is None
        if attention_mask is None and no_answer:
            return None
        return joint_mask(valid_tokens(embeds, attention_mask), token_type_ids)

    def _run_experts(
        self,
        embeds: torch.Tensor,
        rotary: Rotary,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        seen: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor | None, Prefix]:
        """Last hidden states of VLM and depth expert, and what the action expert reads.

        Args:
            seen: pixel_values, view_mask and depth_map of `forward`.
        """
        language_model, expert = self.vlm.language_model, self.depth_expert
        length = embeds.shape[1] if attention_mask is None else attention_mask.sum(-1, keepdim=True)
        mask, depth_hidden, streams = attention_mask, None, ()
        if expert is not None:
            depth_tokens, depth_mask = expert.embed(*seen), expert.token_mask(seen[1])
            if attention_mask is not None or depth_mask is not None:
                valid, there = valid_tokens(embeds, attention_mask), valid_tokens(depth_tokens, depth_mask)
                mask = torch.cat([valid, there], dim=1)
            if self.config.mask == "full":
                allowed = None
                if mask is not None:
                    allowed = joint_mask(valid, token_type_ids, there)
                (hidden, depth_hidden), stream = run_together(
                    (language_model, expert.decoder),
                    (embeds, depth_tokens),
                    allowed,
                    (rotary, tuple(part.expand(len(embeds), -1, -1) for part in expert.rotary(depth_tokens))),
                )
                return hidden, depth_hidden, Prefix((stream,), mask, length)
            depth_hidden, depth_stream = expert.run(depth_tokens, depth_mask)
            streams = (depth_stream,)
        cache = RecordingCache()
        allowed = self._allowed(embeds, attention_mask, token_type_ids)
        hidden = run_layers(language_model, embeds, cache, allowed, rotary)
        return hidden, depth_hidden, Prefix((cache.stream, *streams), mask, length)

    def _read_depth(self, depth_hidden: torch.Tensor) -> torch.Tensor:
        """What the depth expert knows of the place of each visual token of the first view, (B, N, hidden)."""
        expert = self.depth_expert
        merge, grid = expert.config.merge_size, expert.grid
        read = self.depth_reading(depth_hidden[:, : grid * grid])
        read = read.unflatten(1, (grid, grid)).unflatten(-1, (merge, merge, -1))  # (B, y, x, cell y, cell x, hidden)
        return read.transpose(2, 3).flatten(3, 4).flatten(1, 3)

    def _first_view(self, tokens: torch.Tensor, view_mask: torch.Tensor | None) -> torch.Tensor:
        """Visual tokens (B, N, hidden) of each sample's first view, among those of all views that are there."""
        if view_mask is None:
            return tokens[:: len(self.config.views)]
        return tokens[view_mask.sum(-1).cumsum(0) - view_mask.sum(-1)]


def valid_tokens(tokens: torch.Tensor, mask: torch.Tensor | None, cached: int = 0) -> torch.Tensor:
    """`mask` (B, cached + L) of tokens (B, L, width), int64; of 1 where it is None, that is, all are valid."""
    if mask is not None:
        return mask
    return torch.ones(len(tokens), cached + tokens.shape[1], dtype=torch.int64, device=tokens.device)


class DepthVLAForActionPrediction(DepthVLAPreTrainedModel, PolicyForActionPrediction, GenerationMixin):
    """DepthVLA with its language head and its action expert."""

    parts = {
        "vision": "model.vlm.vision_tower",
        "projector": "model.vlm.multi_modal_projector",
        "language_model": "model.vlm.language_model",
        "lm_head": "lm_head",
        "depth_encoder": "model.depth_expert.encoder",
        "stereo": "model.depth_expert.stereo",
        "depth_expert": "model.depth_expert",
        "action_expert": "action_expert",
        "pointers": "pointers",
    }
    towers = ("vision", "depth_encoder", "stereo")
    _tied_weights_keys = {"lm_head.weight": "model.vlm.language_model.embed_tokens.weight"}

    def __init__(self, config: DepthVLAConfig):
        super().__init__(config)
        self.model = DepthVLAModel(config)
        self._add_heads(config)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        facing: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        is_action: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        depth_map: torch.Tensor | None = None,
        points: torch.Tensor | None = None,
        names: torch.Tensor | None = None,
        name_points: torch.Tensor | None = None,
        displacement: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        equal_turns: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        delay: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        language_weights: torch.Tensor | None = None,
        counts: dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_depth: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> DepthVLAOutput | tuple:
        """Losses of a mixed batch; without labels and actions, the language logits.

        Args:
            input_ids, pixel_values, view_mask, attention_mask, token_type_ids: as in `DepthVLAModel.forward`.
            labels: (B, L) int64, -100 = no loss; shifted inside.
            state: (B, state_history, state_dim), normalised.
            facing: (B, num_turns) rad, where the tool faces now, of a model that tells turns apart
                (`config.turn_symmetry`).
            actions: (B, chunk_size, action_dim), normalised; is_action: (B,) bool, the samples with an action loss
                (default: all); action_mask: (B, chunk_size) bool, the steps with one (default: all).
            depth_map: (B, V, H, W), true depth of the views in m, 0 = unknown.
            points: (B, P, 2), pixels in the first view of target, gripper and destination, NaN = unknown; without a
                destination P may be 2.
            names: (B, K, L) int64, words of the names of objects, -100 = no further one; name_points: (B, K, 2), pixels
                in the first view of these objects, NaN = unknown. With actions.
            displacement: (B, pose_dim), the way to the keyframe (see the processor), NaN = unknown.
            turns: (B, T), the turns to it in rad where they are apart (`config.turn_symmetry`), NaN = unknown;
                equal_turns: (B,), how many turns in a whole one are as right (default: `turn_symmetry`).
            noise: (B, K, chunk_size, action_dim) and time: (B, K), of flow matching; drawn (with `generator`) when
                absent. delay: (B, K) int64, the first steps that are given without noise, up to `config.max_delay`.
            language_weights: (B,), factors on the language losses of the samples (default: 1).
            counts: what each sum of losses is divided by, those of `loss_counts` when absent (see StereoVLA).
            output_depth: return the predicted depth also where there is no true one.
        """
        refuse_unknown_inputs(kwargs, DepthVLAForActionPrediction.forward)
        targets = Targets(
            labels,
            language_weights,
            actions,
            is_action,
            action_mask,
            points=points,
            name_points=name_points,
            displacement=displacement,
            turns=turns,
            equal_turns=equal_turns,
            depth_map=depth_map,
        )
        acts = actions is not None
        if attention_mask is None and (acts or token_type_ids is not None) and input_ids is not None:
            attention_mask = torch.ones_like(input_ids)
        depth_expert = self.model.depth_expert
        if acts and depth_expert is not None and depth_map is None and self.config.depth_map_loss_weight:
            # nothing known: processes that share weights must all have gradients for them, be they 0
            views, size = len(self.config.views), self.config.image_size
            targets.depth_map = pixel_values.new_zeros(len(pixel_values), views, size, size)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            view_mask=view_mask,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            depth_map=depth_map,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_depth=depth_expert is not None and (output_depth or targets.depth_map is not None),
            output_prefix=acts,
            **({} if acts else {CACHE: past_key_values if cache is None else cache, "use_cache": use_cache}),
        )
        predictions = Predictions(log_depth=outputs.log_depth)
        hidden = outputs.last_hidden_state
        logits = None
        if labels is not None or not acts:
            logits = self._logits(hidden, predictions, targets, logits_to_keep)
        if acts:
            is_prompt = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            is_prompt = is_prompt if token_type_ids is None else is_prompt * (token_type_ids == 0)
            state_tokens, predictions.pointed = self._state_tokens(
                state, input_ids, is_prompt, outputs, targets=targets, facing=facing, names=names
            )
            draws = Draws(noise, time, None, delay).completed(self.config, actions, generator)
            self._predict_velocities(
                predictions, self._prompt_alone(outputs.prefix, token_type_ids), state_tokens, targets, draws
            )
        losses = sum_losses(self.objectives, predictions, targets, counts)
        if acts and labels is None and self.training:
            # the VLM's last layer leads to nothing here; its gradients are 0, not absent, on every process
            losses["loss"] = losses["loss"] + 0.0 * self.lm_head(hidden[:, :0]).sum()
        output = DepthVLAOutput(
            logits=logits,
            velocity=predictions.velocity[: len(targets.acting)] if acts else None,
            depth=None if outputs.log_depth is None else outputs.log_depth.exp(),
            **{CACHE: None if acts or CACHE not in outputs else outputs[CACHE]},
            **losses,
        )
        return output if return_dict is not False else output.to_tuple()

    def _prompt_alone(self, prefix: Prefix, token_type_ids: torch.Tensor | None) -> Prefix:
        """The prefix as the action expert sees it: without answers, which it would not have when it acts."""
        if token_type_ids is None:
            return prefix
        prompt = (token_type_ids == 0).to(prefix.mask.dtype)
        length = prompt.shape[1]
        mask = torch.cat([prefix.mask[:, :length] * prompt, prefix.mask[:, length:]], dim=1)
        return Prefix(prefix.streams, mask, mask[:, :length].sum(-1, keepdim=True))

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        state: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        depth_map: torch.Tensor | None = None,
        num_steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        facing: torch.Tensor | None = None,
        running_actions: torch.Tensor | None = None,
        delay: torch.Tensor | int | None = None,
        **unused,
    ) -> torch.Tensor:
        """Action chunks (B, chunk_size, action_dim), normalised; `processor.decode_actions` gives robot units.

        Args:
            input_ids, pixel_values, view_mask, attention_mask: as in `DepthVLAModel.forward`; prompts alone.
            token_type_ids: (B, L), all 0, as the processor returns them.
            state: (B, state_history, state_dim), normalised.
            depth_map: (B, V, H, W) in m, where the depth expert's input is depth.
            facing: (B, num_turns), as in `forward`.
            num_steps: Euler steps (default: `config.num_inference_steps`).
            noise: (B, chunk_size, action_dim), standard normal, where the integration starts once it is multiplied by
                `config.noise_scale`; drawn with `generator` when absent.
            running_actions: (B, chunk_size, action_dim), normalised, what is left of the chunk that is executed, which
                the new one continues; NaN = no such step. delay: (B,) int64, or one for all, how many of them will
                have been executed by then; see `_begin`.
        """
        refuse_targets(unused)
        if token_type_ids is not None:
            rule = "token_type_ids mark an answer; predict_action takes prompts alone"
            require(token_type_ids == 0, rule, lambda: rule)
        return self._act(
            self._begin(input_ids, num_steps, noise, generator, running_actions, delay),
            state,
            facing,
            input_ids=input_ids,
            pixel_values=pixel_values,
            view_mask=self.model.check_images(input_ids, pixel_values, view_mask),
            attention_mask=unless_all(attention_mask),
            depth_map=depth_map,
        )

    def _act(
        self, begin: Beginning, state: torch.Tensor, facing: torch.Tensor | None, **shown: torch.Tensor | None
    ) -> torch.Tensor:
        """What `predict_action` computes, in which no value is looked at, but for views that are absent.

        Args:
            shown: inputs of `self.model`; view_mask None = all are there, attention_mask None = nothing is padded.
        """
        outputs = self.model(**shown)
        state_tokens, _ = self._state_tokens(state, shown["input_ids"], shown["attention_mask"], outputs, facing=facing)
        return self._integrate(outputs.prefix, state_tokens, begin)

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, is_first_iteration=False, **kwargs):
        """Images enter with the prompt only; later steps read them from the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, num_new_tokens=1, **kwargs):
        """New tokens are the answer's: the prompt, which is read anew where there is no cache, does not see them."""
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        if updated.get("token_type_ids") is None:
            # transformers leaves out a mask that is all 1, but not the positions
            like = next(updated[name] for name in ("attention_mask", "position_ids") if updated.get(name) is not None)
            updated["token_type_ids"] = torch.zeros_like(like)
        updated["token_type_ids"][:, -num_new_tokens:] = 1
        return updated


__all__ = ["DepthVLAForActionPrediction", "DepthVLAModel", "DepthVLAPreTrainedModel"]
