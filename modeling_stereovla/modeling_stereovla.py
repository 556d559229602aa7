"""StereoVLA (arXiv 2512.21970): a vision-language-action model that sees with two eyes."""

from contextlib import ExitStack

import torch
from torch import nn
from transformers import GenerationMixin, LlamaModel
from transformers.cache_utils import Cache

from .action_expert import Prefix
from .configuration_stereovla import StereoVLAConfig
from .flow_matching import Draws
from .language_pointing import chosen_keys, log_attention, log_share, recorded_outputs
from .layer_caches import CACHE, BufferedCache, ContinuingCache, PrefixCache, RecordingCache
from .model_outputs import StereoVLAModelOutput, StereoVLAOutput, refuse_targets, refuse_unknown_inputs
from .objectives import Predictions, Targets, sum_losses
from .place_code import write_bins, write_hundredths, write_pixels
from .pointing import in_picture
from .policy import Beginning, PolicyForActionPrediction, PolicyPreTrainedModel, next_positions, valid_positions
from .prefix_layer import with_prefix_layer
from .rotary_embedding import without_waiting
from .values import require, unless_all
from .visual_tokens import StereoVisualTokens, VisualTokens


class StereoVLAPreTrainedModel(PolicyPreTrainedModel):
    config: StereoVLAConfig
    config_class = StereoVLAConfig
    _no_split_modules = ["LlamaDecoderLayer", "PrefixLayer", "SiglipEncoderLayer", "Dinov2WithRegistersLayer"]


class StereoVLAModel(StereoVLAPreTrainedModel):
    """Visual tokens of the pair inside the language model's sequence: the policy without its heads."""

    def __init__(self, config: StereoVLAConfig):
        super().__init__(config)
        self.visual_tokens = StereoVisualTokens(config)
        self.language_model = with_prefix_layer(without_waiting(LlamaModel._from_config(config.text_config)))
        for layer in self.language_model.layers:
            layer._can_checkpoint_with_cache = True  # of a training step: RecordingCache may be written twice
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def embed(
        self, input_ids: torch.Tensor | None, visual_tokens: torch.Tensor | None, embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token embeddings (B, L, hidden), those of `input_ids` unless given as `embeds`, in which the visual tokens
        take the places of the image token id.
        """
        if input_ids is None and (embeds is None or visual_tokens is not None):
            raise ValueError("input_ids is missing: beside inputs_embeds too it says where the visual tokens go")
        if embeds is None:
            embeds = self.get_input_embeddings()(input_ids)
        if visual_tokens is None:
            return embeds
        is_image = input_ids == self.config.image_token_id
        return embeds.masked_scatter(is_image[..., None], visual_tokens.to(embeds.dtype))

    def check_images(self, input_ids: torch.Tensor | None, pixel_values: torch.Tensor) -> None:
        """ValueError unless the pairs have the model's size, and each row of `input_ids` a place for each visual token.
        Before anything is computed, when no device has to be waited for.
        """
        size, needed = self.config.image_size, self.config.num_image_tokens
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[1:]) != (2, 3, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (batch, 2, 3, {size}, "
                f"{size}), left view first"
            )
        if input_ids is None:
            return  # `embed` says what it is needed for
        counts = (input_ids == self.config.image_token_id).sum(-1)
        require(
            counts == needed,
            f"each row of input_ids needs {needed} image tokens, one for each visual token",
            lambda: (
                f"input_ids hold {counts.tolist()} image tokens (id {self.config.image_token_id}) in the rows of this "
                f"batch; each row needs {needed}, one for each visual token"
            ),
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_disparity: bool = False,
        disparity_rows: torch.Tensor | None = None,
        disparity: torch.Tensor | None = None,
        point_transform: torch.Tensor | None = None,
        point_frame: torch.Tensor | None = None,
        frames: torch.Tensor | None = None,
        **kwargs,
    ) -> StereoVLAModelOutput:
        """
        Args:
            input_ids: (B, L) int64, with `config.num_image_tokens` image tokens in each row when images are given.
            pixel_values: (B, 2, 3, H, W), RGB in [0, 1], left view first.
            attention_mask: (B, L) or (B, cached + L), 1 = valid token.
            cache: keys and values of earlier tokens; before transformers 5.24, past_key_values.
            output_disparity: also return the stereo encoder's disparity.
            disparity_rows: (B,) bool, the samples that the stereo encoder learns from, and whose disparity is returned,
                where `config.stereo_learns_from` is "disparity"; None = all.
            disparity, point_transform, point_frame: see `StereoVisualTokens`.
            frames: (B,) int64, which of the pairs each sample is about, where several share one: whatever is of the
                pairs is then given, and computed, once for each; None = sample for sample. With a `RecordingCache`.
        """
        seen = None
        if pixel_values is not None:
            # of samples that share pictures, all begin with the image tokens
            first = input_ids if frames is None else input_ids[:, : 1 + self.config.num_image_tokens]
            self.check_images(first, pixel_values)
            seen = self.visual_tokens(
                pixel_values.to(self.dtype), output_disparity, disparity_rows, disparity, point_transform, point_frame
            )
        if frames is not None:
            return self._forward_shared(input_ids, attention_mask, seen, frames, cache)
        inputs_embeds = self.embed(input_ids, None if seen is None else seen.tokens, inputs_embeds)
        cache = past_key_values if cache is None else cache
        if position_ids is None:
            position_ids = next_positions(inputs_embeds, attention_mask, cache)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        return StereoVLAModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_tokens=None if seen is None else self._of_left_view(seen),
            disparity=None if seen is None else seen.disparity,
            points=None if seen is None else seen.points,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )

    def _of_left_view(self, seen: VisualTokens) -> torch.Tensor:
        """The visual tokens (B, N, hidden) that lie in the left view, which points are about."""
        return seen.tokens[:, : self.config.num_visual_tokens]

    def _forward_shared(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        seen: VisualTokens,
        frames: torch.Tensor,
        cache: RecordingCache,
    ) -> StereoVLAModelOutput:
        """`forward` where samples share pairs: a picture's tokens come first and see no words, so that the language
        model reads them once for all questions about it. Visual tokens and points stay those of the pictures; the last
        hidden states begin with that of the last image token, from which the first word is predicted.
        """
        length = 1 + self.config.num_image_tokens
        start = input_ids[0, :length]
        rule = "samples that share pictures (frames) must all begin with BOS and the image tokens: pad on the right"
        require((input_ids[:, :length] == start) & attention_mask[:, :length].bool(), rule, lambda: rule)
        pictures = PrefixCache()
        first = self.language_model(
            inputs_embeds=self.embed(start.expand(len(seen.tokens), -1), seen.tokens),
            use_cache=False,
            **{CACHE: pictures},
        )
        words = ContinuingCache(pictures.stream, frames)
        second = self.language_model(
            inputs_embeds=self.embed(input_ids[:, length:], None),
            attention_mask=attention_mask,
            position_ids=valid_positions(attention_mask)[:, length:],
            use_cache=False,
            **{CACHE: words},
        )
        cache.states = words.states
        return StereoVLAModelOutput(
            last_hidden_state=torch.cat([first.last_hidden_state[frames], second.last_hidden_state], dim=1),
            visual_tokens=self._of_left_view(seen),
            disparity=seen.disparity,
            points=seen.points,
        )


class StereoVLAForActionPrediction(StereoVLAPreTrainedModel, PolicyForActionPrediction, GenerationMixin):
    """StereoVLA with its language head and its action expert. The paper's frozen towers are the parts "semantic",
    "spatial" and "stereo".
    """

    parts = {
        "semantic": "model.visual_tokens.semantic",
        "spatial": "model.visual_tokens.spatial",
        "stereo": "model.visual_tokens.stereo",
        "view_attention": "model.visual_tokens.view_attention",
        "projector": "model.visual_tokens.projector",
        "language_model": "model.language_model",
        "lm_head": "lm_head",
        "action_expert": "action_expert",
        "pointers": "pointers",
    }
    towers = ("semantic", "spatial", "stereo")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: StereoVLAConfig):
        super().__init__(config)
        self.model = StereoVLAModel(config)
        self._add_heads(config)
        if config.place_code:
            grid, first_bin = config.image_size // config.patch_size, config.action_vocab_size - config.num_bins
            for weight in (self.get_input_embeddings().weight, self.lm_head.weight):
                write_bins(weight, first_bin, config.num_bins, grid)
                if config.num_hundredths:
                    write_hundredths(weight, first_bin - config.num_hundredths, grid)

    def write_pixels(self, pixels: dict[int, int]) -> None:
        """Gives words that are numbers the code of the pixels that they name, `config.place_code`; `pixels`: id -> px.
        For an untrained model, whose tokenizer has whole numbers.
        """
        for weight in (self.get_input_embeddings().weight, self.lm_head.weight):
            write_pixels(weight, pixels, self.config.image_size, self.config.image_size // self.config.patch_size)

    # ---- training and language
    # ----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        facing: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        is_action: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        disparity: torch.Tensor | None = None,
        points: torch.Tensor | None = None,
        names: torch.Tensor | None = None,
        name_points: torch.Tensor | None = None,
        displacement: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        equal_turns: torch.Tensor | None = None,
        point_transform: torch.Tensor | None = None,
        point_frame: torch.Tensor | None = None,
        answer_points: torch.Tensor | None = None,
        asked_words: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        hide_pose: torch.Tensor | None = None,
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
        output_disparity: bool = False,
        frames: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> StereoVLAOutput | tuple:
        """Losses of a mixed batch; without labels and actions, the language logits.

        Args:
            input_ids, attention_mask: (B, L) int64: BOS, image tokens, prompt, past and current state ids, pose ids,
                EOS.
            pixel_values: (B, 2, 3, H, W), RGB in [0, 1], left first.
            labels: (B, L) int64, -100 = no loss; shifted inside.
            state: (B, state_history, state_dim), normalised.
            facing: (B, num_turns) rad, where the tool faces now, of a model that tells turns apart
                (`config.turn_symmetry`).
            actions: (B, chunk_size, action_dim), normalised; is_action: (B,) bool, the samples with an action loss
                (default: all).
            action_mask: (B, chunk_size) bool, the steps with an action loss (default: all), as the processor returns
                it: what it filled a short chunk up with teaches nothing.
            disparity: (B, H, W), true disparity of the left view in px, 0 = unknown.
            points: (B, P, 2), pixels in the left view of target, gripper and destination, NaN = unknown; without a
                destination P may be 2.
            names: (B, K, L) int64, words of the names of objects, -100 = no further one; name_points: (B, K, 2), pixels
                in the left view of these objects, NaN = unknown. With actions.
            displacement: (B, pose_dim), the way to the keyframe (see the processor), NaN = unknown.
            turns: (B, T), the turns to it in rad where they are apart (`config.turn_symmetry`), NaN = unknown;
                equal_turns: (B,), how many turns in a whole one are as right (default: `turn_symmetry`).
            point_transform, point_frame: (B, 4, 4) and (B,) of the processor, for a model with `config.points_frame`;
                without them it sees no points.
            answer_points: (B, L, 2), pixels in the left view that the labels are about, NaN = nothing, or not seen.
            asked_words: (B, L) bool, the tokens of the question that say what is asked for.
            output_disparity: return the predicted disparity also where there is no true one.
            noise: (B, K, chunk_size, action_dim) and time: (B, K), one row for each sample, of which those with an
                action loss are read; drawn (with `generator`) when absent.
            hide_pose: (B,) bool, the samples whose action expert does not see the keyframe pose; drawn with
                `config.direct_probability` when absent.
            delay: (B, K) int64, the first steps of a chunk that are given without noise and have no loss; drawn up to
                `config.max_delay` when absent.
            language_weights: (B,), factors on the language losses of the samples (default: 1).
            frames: (B,) int64, which of the pairs each sample is about, where several share one: pixel_values,
                disparity, point_transform and point_frame are then of the pairs (default: of the samples), which are
                seen, and read by the language model, once. In training.
            counts: what each sum of losses is divided by, those of `loss_counts` when absent. Where a batch is split
                over processes or accumulation steps, the counts of the whole batch make the losses, and their
                gradients, add up to the whole batch's.
        """
        refuse_unknown_inputs(kwargs, StereoVLAForActionPrediction.forward)
        targets = Targets(
            labels,
            language_weights,
            actions,
            is_action,
            action_mask,
            disparity,
            points,
            displacement,
            turns,
            equal_turns,
            answer_points=answer_points,
            name_points=name_points,
        )
        acts = actions is not None
        looks = answer_points is not None and self.config.language_pointing_layer is not None
        point_frame = self._told_frame(point_frame, generator)
        disparity_rows = self._choose_disparity(targets, pixel_values) if acts else None
        if (acts or looks) and attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        recorder = RecordingCache() if acts or looks else None
        with ExitStack() as recording:
            queries = [recording.enter_context(recorded_outputs(layer)) for layer in self._asking_layers(looks)]
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=recorder if acts or looks else past_key_values if cache is None else cache,
                inputs_embeds=inputs_embeds,
                use_cache=False if acts or labels is not None else use_cache,
                output_disparity=output_disparity or self._compares(targets),
                disparity_rows=disparity_rows,
                disparity=disparity,
                point_transform=point_transform,
                point_frame=point_frame,
                frames=frames,
                **kwargs,
            )
        hidden, begin = outputs.last_hidden_state, 0  # the first token that there is a hidden state of
        if frames is not None:
            begin = self.config.num_image_tokens
            self._require_behind(begin, targets.labelled_at)
            point_frame = None if point_frame is None else point_frame[frames]
            # of the last image token, and of words
            queries = [[torch.cat([made[0][:, -1:][frames], made[1]], dim=1)] for made in queries]
        predictions = Predictions(disparity=outputs.disparity)
        if looks:
            positions = valid_positions(attention_mask) if position_ids is None else position_ids
            asked = in_picture(answer_points[:, 1:], self.config.image_size).nonzero(as_tuple=True)
            self._require_behind(begin, asked)
            rotation = self.model.language_model.rotary_emb(hidden, positions[:, begin:])
            reading, pointing = (
                log_attention(made[0], rotation, recorder.states[layer][0], asked, attention_mask.bool())
                for layer, made in enumerate(queries, self.config.language_pointing_layer - 1)
            )
            is_image = input_ids == self.config.image_token_id
            words = torch.zeros_like(is_image) if asked_words is None else asked_words
            seen = chosen_keys(pointing, is_image[asked[0]], self.config.num_image_tokens)
            predictions.language_pointing = seen[..., : self.config.num_visual_tokens]
            predictions.language_reading = log_share(reading, words[asked[0]])
        logits = self._logits(hidden, predictions, targets, logits_to_keep, begin)
        if acts:
            state_tokens, predictions.pointed = self._state_tokens(
                state, input_ids, attention_mask, outputs, point_frame, targets, facing, frames, names
            )
            draws = Draws(noise, time, hide_pose, delay).completed(self.config, actions, generator)
            mask = attention_mask if draws.hide_pose is None else self._without_pose(attention_mask, draws.hide_pose)
            self._predict_velocities(predictions, Prefix.of(recorder.stream, mask), state_tokens, targets, draws)
        output = StereoVLAOutput(
            logits=logits,
            velocity=predictions.velocity[: len(targets.acting)] if acts else None,
            disparity=self._finest(outputs.disparity),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: None if acts or CACHE not in outputs else outputs[CACHE]},
            **sum_losses(self.objectives, predictions, targets, counts),
        )
        return output if return_dict is not False else output.to_tuple()

    def _compares(self, targets: Targets) -> bool:
        """Whether there is a disparity to learn from; that which a model without stereo encoder is shown is none."""
        return targets.disparity is not None and not (self.config.reads_depth and self.config.stereo_config is None)

    def _finest(self, maps: list[torch.Tensor] | None) -> torch.Tensor | None:
        """(B', h, w) px of the view, of its disparity maps."""
        return None if maps is None else (maps[-1] * (self.config.image_size / maps[-1].shape[-1])).squeeze(1)

    def _told_frame(self, point_frame: torch.Tensor | None, generator: torch.Generator | None) -> torch.Tensor | None:
        """`point_frame` with that of a share of the training samples dropped (`config.calibration_dropout`)."""
        dropped = self.config.calibration_dropout
        if point_frame is None or not self.training or not dropped:
            return point_frame
        drawn = torch.rand(len(point_frame), generator=generator, device=point_frame.device)
        return point_frame * (drawn >= dropped)

    def _require_behind(self, begin: int, tokens: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """ValueError unless `tokens`, rows and places, from which something is predicted, are at `begin` or behind."""
        rule = "of samples that share pictures (frames) image tokens must have no labels"
        if begin and tokens is not None:
            require(tokens[1] >= begin, rule, lambda: rule)

    def _asking_layers(self, wanted: bool) -> list[nn.Module]:
        """What makes the queries of the layer that learns to read a question, and of the one that learns to point."""
        layers, pointing = self.model.language_model.layers, self.config.language_pointing_layer
        return [layer.self_attn.q_proj for layer in layers[pointing - 1 : pointing + 1]] if wanted else []

    def _choose_disparity(self, targets: Targets, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """The samples (B,) bool that the stereo encoder learns from, to which the target is cut; None = all."""
        learns = self.config.stereo_learns_from == "disparity"
        if targets.disparity is None and (learns or self.config.disparity_loss_weight):
            # nothing known: processes that share weights must all have gradients for them, be they 0
            targets.disparity = pixel_values.new_zeros(len(pixel_values), *pixel_values.shape[-2:])
        if not learns:
            return None
        rows = targets.disparity.flatten(1).any(-1)
        rows[0] |= ~rows.any()
        targets.disparity = targets.disparity[rows]
        return rows

    def _without_pose(self, attention_mask: torch.Tensor, hide_pose: torch.Tensor) -> torch.Tensor:
        """The prefix (B, L) that the expert sees: without the keyframe pose and its EOS where `hide_pose` (B,)."""
        from_end = attention_mask.flip(-1).cumsum(-1).flip(-1)  # 1 at the last valid token
        is_pose = from_end <= self.config.pose_dim + 1
        return attention_mask * ~(is_pose & hide_pose[:, None])

    # ---- inference
    # ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        state: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        facing: torch.Tensor | None = None,
        running_actions: torch.Tensor | None = None,
        delay: torch.Tensor | int | None = None,
        chain_of_thought: bool | None = None,
        point_transform: torch.Tensor | None = None,
        point_frame: torch.Tensor | None = None,
        disparity: torch.Tensor | None = None,
        **unused,
    ) -> torch.Tensor:
        """Action chunks (B, chunk_size, action_dim), normalised; `processor.decode_actions` gives robot units.

        Args:
            input_ids, attention_mask: (B, L), prompts up to the current state ids; padded on either side, or, without
                the mask, not at all.
            pixel_values: (B, 2, 3, H, W), RGB in [0, 1], left first.
            state: (B, state_history, state_dim), normalised.
            facing: (B, num_turns), as in `forward`.
            num_steps: Euler steps (default: `config.num_inference_steps`).
            noise: (B, chunk_size, action_dim), standard normal, where the integration starts once it is multiplied by
                `config.noise_scale`; drawn with `generator` when absent.
            running_actions: (B, chunk_size, action_dim), normalised, what is left of the chunk that is executed, which
                the new one continues; NaN = no such step. delay: (B,) int64, or one for all, how many of them will
                have been executed by then; see `_begin`.
            chain_of_thought: generate the keyframe pose first (default: `config.chain_of_thought`).
            point_transform, point_frame, disparity: as in `forward`; the last where `config.points_of` is "given".
        """
        refuse_targets(unused)
        if chain_of_thought is None:
            chain_of_thought = self.config.chain_of_thought
        self.model.check_images(input_ids, pixel_values)
        return self._act(
            self._begin(input_ids, num_steps, noise, generator, running_actions, delay),
            chain_of_thought,
            state,
            facing,
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=unless_all(attention_mask),
            disparity=disparity,
            point_transform=point_transform,
            point_frame=point_frame,
        )

    def _act(
        self,
        begin: Beginning,
        chain_of_thought: bool,
        state: torch.Tensor,
        facing: torch.Tensor | None,
        **shown: torch.Tensor | None,
    ) -> torch.Tensor:
        """What `predict_action` computes, in which no value is looked at.

        Args:
            shown: inputs of `self.model`; attention_mask None = nothing is padded.
        """
        input_ids, mask = shown["input_ids"], shown["attention_mask"]
        room = input_ids.shape[1] + self.config.pose_dim + 1
        cache = BufferedCache(room=room) if chain_of_thought else PrefixCache()
        outputs = self.model(**shown, cache=cache, use_cache=False)
        prefix_mask = mask
        if chain_of_thought:
            cache.begin += input_ids.shape[1]
            _, prefix_mask = self._generate_pose(cache, outputs.last_hidden_state, mask)
        prefix = Prefix.of(cache.stream, prefix_mask)
        state_tokens, _ = self._state_tokens(state, input_ids, mask, outputs, shown["point_frame"], facing=facing)
        return self._integrate(prefix, state_tokens, begin)

    def _generate_pose(
        self, cache: BufferedCache, hidden: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Greedily appends the pose tokens and the EOS slot to `cache`: their ids (B, pose_dim + 1) and the longer
        mask.

        A plain argmax over the vocabulary, EOS not forced, as the released code decodes.
        """
        mask, state = attention_mask, hidden[:, -1]
        if mask is not None:
            # the last valid token of each row, wherever the padding is
            last = hidden.shape[1] - 1 - mask.flip(-1).argmax(-1)
            state = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        generated = []
        for _ in range(self.config.pose_dim + 1):
            token = self.lm_head(state).argmax(-1)
            generated.append(token)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=-1)
            state = self.model(
                input_ids=token[:, None], attention_mask=mask, cache=cache, use_cache=False
            ).last_hidden_state[:, -1]
            cache.begin += 1
        return torch.stack(generated, dim=1), mask

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, is_first_iteration=False, **kwargs):
        """Images enter with the prompt only; later steps read them from the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


__all__ = ["StereoVLAForActionPrediction", "StereoVLAModel", "StereoVLAPreTrainedModel"]
