"""What every policy of ours shares, around whatever sees and reads: an action expert, pointers, frozen parts, a robot's
sizes, the sum of the losses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, cached_file

from .action_expert import ActionExpert, Prefix
from .flow_matching import Draws, euler_integrate, euler_numbers, euler_times, interpolate
from .objectives import IGNORED, Predictions, Targets, count_targets, objectives_of
from .pointing import Pointed, Pointers, WordsBefore
from .quantization import WHOLE, input_dtype
from .real_time_chunking import RunningChunk, guided
from .robot_heads import resize_heads, sizes_in_tensors, sizes_of_robot
from .values import require


def valid_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among the valid ones of its row, (B, L) int64; 0 on leading padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass
class Beginning:
    """What a batch of chunks begins with, and how they go on.

    num_steps: Euler steps.
    noise: (B, chunk_size, action_dim).
    running: what the chunks continue; None = nothing.
    guide: whether `running` guides them through gradients; else its delayed steps are given to them.
    """

    num_steps: int
    noise: torch.Tensor
    running: RunningChunk | None = None
    guide: bool = False


def next_positions(tokens: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
    """Positions (B, L) of tokens (B, L, width) behind those in `cache`, among the valid ones of their row; (1, L) where
    `attention_mask` (B, cached + L) is None, that is, all are valid.
    """
    if attention_mask is not None:
        return valid_positions(attention_mask)[:, -tokens.shape[1] :]
    cached = 0 if cache is None else cache.get_seq_length()
    return torch.arange(cached, cached + tokens.shape[1], device=tokens.device)[None]


class PolicyPreTrainedModel(PreTrainedModel):
    """Defaults of transformers for our policies, and their weights before training."""

    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # the loss is a mean already: Trainer divides it by the accumulation steps only where it is told so
    accepts_loss_kwargs = False

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **options
    ):
        """As in transformers; ValueError for reentrant checkpoints, which lose the gradients of keys and values that
        the action expert reads.
        """
        if enable:
            chosen = getattr(gradient_checkpointing_func, "keywords", {})
            if chosen.get("use_reentrant"):
                raise ValueError(
                    "use_reentrant=True gives wrong gradients here, as the action expert reads keys and values from "
                    "inside the checkpointed layers; use gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            options["gradient_checkpointing_func"] = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, **options)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, WordsBefore):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            # the same variance out as in, at any width: with a fixed 0.02 the small presets hardly learn to point
            # (66 % of the targets found after 200 steps, 94 % with this)
            init.normal_(module.weight, 0.0, module.in_features**-0.5)


class PolicyForActionPrediction(PolicyPreTrainedModel):
    """A policy with its language head and its action expert; `self.model` is what sees and reads.

    Attributes:
        parts: what `freeze` can hold fixed, and where it is.
        towers: those of them that come trained, but for those of the small presets.
    """

    parts: ClassVar[dict[str, str]]
    towers: ClassVar[tuple[str, ...]]

    def _add_heads(self, config) -> None:
        """The parts beside `self.model`, at the end of `__init__`."""
        if getattr(config, "quantization_config", None) is not None:
            self._keep_in_fp32_modules = list(WHOLE)  # quantisers leave these whole, whatever the dtype
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.action_expert = ActionExpert(config)
        self.pointers = Pointers(config) if config.use_pointers else None
        self.objectives = objectives_of(config)
        self.frozen: tuple[str, ...] = ()
        self._held: list[nn.Parameter] = []
        self.post_init()

    def freeze(self, *parts: str) -> "PolicyForActionPrediction":
        """Holds exactly these parts fixed (keys of `parts`; none = train all): no gradients, and evaluation mode even
        in training, so that running statistics and dropout stay still too.
        """
        modules = dict(self.named_modules())
        present = [name for name, path in self.parts.items() if path in modules]
        if unknown := sorted(set(parts) - set(present)):
            raise ValueError(f"cannot freeze {', '.join(unknown)}; this model has {', '.join(present)}")
        for parameter in self._held:
            parameter.requires_grad_(True)
        self.frozen = parts
        # not those that never train, such as a tower's mask token: they must not thaw
        self._held = [p for name in parts for p in self.get_submodule(self.parts[name]).parameters() if p.requires_grad]
        for parameter in self._held:
            parameter.requires_grad_(False)
        return self.train(self.training)

    def resize_heads(
        self, state_dim: int, action_dim: int, num_turns: int | None = None
    ) -> "PolicyForActionPrediction":
        """Gives the model the sizes of another robot; the layers whose size changes start untrained. `num_turns`:
        rotations in its state, None = as many as before.
        """
        resize_heads(self, sizes_of_robot(state_dim, action_dim, num_turns or self.config.num_turns))
        return self

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        """As in transformers (and called by `AutoModel.from_pretrained` of an adapter). An adapter for a robot of other
        sizes brings its own heads, which get their places first.
        """
        tensors = kwargs.get("adapter_state_dict")
        if tensors is not None:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        else:
            options = {k: v for k, v in (kwargs.get("adapter_kwargs") or {}).items() if k in ("token", "revision")}
            with safe_open(cached_file(peft_model_id, "adapter_model.safetensors", **options), "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if (sizes := sizes_in_tensors(shapes)) is not None:
            resize_heads(self, sizes)
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def train(self, mode: bool = True):
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(self.parts[name]).eval()
        return self

    def loss_counts(self, **inputs) -> dict[str, torch.Tensor]:
        """How many samples, tokens, points and pixels of a batch (inputs of `forward`) have each loss."""
        counts = count_targets(self.objectives, Targets.of(inputs))
        return {name: count.to(self.device) for name, count in counts.items()}

    def _logits(
        self,
        hidden: torch.Tensor,
        predictions: Predictions,
        targets: Targets,
        keep: int | torch.Tensor,
        begin: int = 0,
    ) -> torch.Tensor:
        """Language logits of hidden states (B, L, hidden): with labels those before the labelled tokens alone, (T,
        vocabulary), also into `predictions`; without them, of what `keep` names (`logits_to_keep` of transformers).
        `begin`: the first token that there is a hidden state of.
        """
        if targets.labels is None:
            return self.lm_head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])
        rows, places = targets.labelled_at
        predictions.logits = self.lm_head(hidden[rows, places - begin])
        return predictions.logits

    def _state_tokens(
        self,
        state: torch.Tensor | None,
        input_ids: torch.Tensor,
        is_text: torch.Tensor | None,
        seen: ModelOutput,
        point_frame: torch.Tensor | None = None,
        targets: Targets | None = None,
        facing: torch.Tensor | None = None,
        frames: torch.Tensor | None = None,
        names: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Pointed | None]:
        """The expert's state tokens (B, S, width), the pointers' among them, and what these say.

        Args:
            is_text: (B, L), nonzero = what the pointers may read of `input_ids`, but for bins and image tokens; None =
                all.
            seen: outputs of `self.model`, with visual tokens and, where the model has them, points.
            point_frame: (B,), of the points.
            targets: in training, whose turns decide which of those that hold alike the expert is told.
            facing: (B, num_turns) rad, where the tool faces now.
            frames: (B,) int64, which of the pictures each sample is about, where `seen` is of pictures.
            names: (B', K, L) int64, names of objects in the pictures, `IGNORED` where there is no further word.
        """
        expected = (self.config.state_history, self.config.state_dim)
        if state is None or tuple(state.shape[1:]) != expected:
            raise ValueError(
                f"state has shape {None if state is None else tuple(state.shape)}; it must be (batch, "
                f"{expected[0]}, {expected[1]})"
            )
        tokens = self.action_expert.state_proj(state.to(input_dtype(self.action_expert.state_proj, self.dtype)))
        if self.pointers is None:
            return tokens, None
        if self.config.turn_symmetry and facing is None:
            raise ValueError(
                f"facing is missing; a model of turn_symmetry {self.config.turn_symmetry} needs it, as its processor "
                "gives it beside the state"
            )
        # poses and states are written with the last `num_bins` ids: the pointers must not read the answer from them
        is_word = input_ids < self.config.action_vocab_size - self.config.num_bins
        is_word &= input_ids != self.config.image_token_id
        if is_text is not None:
            is_word &= is_text.bool()
        if targets is not None:
            # most places are of pictures in all samples; acting, a device would wait for how many are not
            somewhere = is_word.any(0)
            input_ids, is_word = input_ids[:, somewhere], is_word[:, somewhere]
        points = getattr(seen, "points", None)
        if points is not None and point_frame is None:
            point_frame = torch.zeros(len(state), dtype=torch.int64, device=state.device)
        pointed = self.pointers(
            seen.visual_tokens,
            self.get_input_embeddings()(input_ids),
            is_word,
            state[:, -1],
            tokens[:, -1],
            points,
            point_frame,
            facing,
            None if targets is None else targets.turns,
            None if targets is None else targets.equal_turns,
            frames,
            None if names is None else (self.get_input_embeddings()(names.clamp(min=0)), names != IGNORED),
        )
        return torch.cat([tokens, pointed.tokens.to(tokens.dtype)], dim=1), pointed

    def _predict_velocities(
        self, predictions: Predictions, prefix: Prefix, state_tokens: torch.Tensor, targets: Targets, draws: Draws
    ) -> None:
        """Velocities of the samples that act, predicted and true, into `predictions`.

        Args:
            prefix: of all samples.
        """
        rows = targets.acting
        if len(rows) == 0:
            # the expert runs all the same, on one sample without a loss: of processes that share its weights, each
            # waits for the others there
            rows = rows.new_zeros(1)
        noise, time = draws.noise[rows], draws.time[rows]
        actions = targets.actions[rows][:, None].expand_as(noise)
        noisy, predictions.flow = interpolate(noise, actions, time)
        if draws.delay is not None:
            # executed before the chunk is there: given as they are, at the time of data
            steps = torch.arange(noise.shape[2], device=noise.device)
            predictions.given = steps < draws.delay[rows][..., None]  # (R, K, chunk)
            noisy = torch.where(predictions.given[..., None], actions, noisy)
            time = torch.where(predictions.given, 0.0, time[..., None])
        predictions.velocity = self.action_expert(
            prefix.rows(rows), state_tokens[rows], noisy.to(state_tokens.dtype), time
        )

    def compile_predict_action(self, **options: Any) -> None:
        """Compiles what `predict_action` computes into one graph; inputs of another kind make another, but not prompts
        of other lengths, nor batches of other sizes from two on. What depends on values is still looked at before:
        whether inputs are valid, whether any are padded, how a chunk is continued.

        Args:
            options: of `torch.compile`, such as mode="reduce-overhead" (CUDA graphs) or dynamic=False (a graph for each
                length and size, which may be faster).
        """
        compiled = torch.compile(type(self)._act.__get__(self), fullgraph=True, **options)

        def act(begin: Beginning, *arguments: Any, **shown: torch.Tensor | None) -> torch.Tensor:
            if options.get("dynamic") is not False:
                running = [] if begin.running is None else vars(begin.running).values()
                for tensor in (begin.noise, *running, *arguments, *shown.values()):
                    if isinstance(tensor, torch.Tensor):
                        torch._dynamo.maybe_mark_dynamic(tensor, 0)
                for name in ("input_ids", "attention_mask"):
                    if shown[name] is not None:
                        torch._dynamo.maybe_mark_dynamic(shown[name], 1)
            return compiled(begin, *arguments, **shown).clone()  # a CUDA graph overwrites its own in the next call

        self._act = act

    def _begin(
        self,
        input_ids: torch.Tensor,
        num_steps: int | None,
        noise: torch.Tensor | None,
        generator: torch.Generator | None,
        running_actions: torch.Tensor | None,
        delay: torch.Tensor | int | None,
    ) -> Beginning:
        """What the chunks of a batch begin with.

        Args:
            input_ids, num_steps, noise, generator: as in `predict_action`.
            running_actions: (B, chunk_size, action_dim), normalised, what is left of the chunk that is executed, the
                present step first; NaN = no such step. The new chunk continues it (`real_time_chunking`): where the
                model was trained with so long delays (`config.max_delay`) they are given to it, else it is guided,
                which takes a backward pass in each step.
            delay: (B,) int64, or one for all: how many of the running actions will have been executed when the chunk
                is there. The chunk has these as they are.
        """
        config = self.config
        num_steps = config.num_inference_steps if num_steps is None else num_steps
        shape = (len(input_ids), config.chunk_size, config.action_dim)
        if noise is None:
            device = input_ids.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; it must be {shape}")
        if (running_actions is None) != (delay is None):
            raise ValueError("running_actions and delay belong together; give both, or none of them")
        if running_actions is None:
            return Beginning(num_steps, noise)
        running, limit = RunningChunk.checked(running_actions, delay, shape), config.max_delay
        guide = not limit
        if torch.compiler.is_compiling():
            rule = "a compiled predict_action takes delays up to config.max_delay; compile_predict_action has no limit"
            if not guide:
                require(running.delay <= limit, rule, lambda: rule)
            return Beginning(num_steps, noise, running, guide)
        guide = guide or bool((running.delay > limit).any())
        if guide and torch.is_inference_mode_enabled():
            raise ValueError(
                "running_actions guide this model through gradients, which torch.inference_mode has not; call "
                "predict_action without it, or train the model with max_delay"
            )
        return Beginning(num_steps, noise, running, guide)

    def _integrate(self, prefix: Prefix, state_tokens: torch.Tensor, begin: Beginning) -> torch.Tensor:
        """Action chunks (B, chunk_size, action_dim)."""
        config, expert, running, num_steps = self.config, self.action_expert, begin.running, begin.num_steps
        device = state_tokens.device
        embedded_times = expert.embed_time(euler_times(num_steps, device))
        read = expert.read_prefix(prefix, state_tokens, config.chunk_size)
        if begin.guide:
            read = read.for_gradients()

        def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
            return expert.denoise(read, x.to(state_tokens.dtype), embedded_times[step])

        start = config.noise_scale * begin.noise.to(device).float()
        if running is None:
            return euler_integrate(velocity, start, num_steps)
        if not begin.guide:
            frozen = running.frozen[..., None]
            at_data = torch.where(frozen, expert.embed_time(torch.zeros((), device=device)), 0)
            embedded = [torch.where(frozen, at_data, time) for time in embedded_times]  # (B, chunk, width)

            def velocity_after(x: torch.Tensor, step: int) -> torch.Tensor:
                return expert.denoise(read, running.kept(x).to(state_tokens.dtype), embedded[step])

            return running.kept(euler_integrate(velocity_after, start, num_steps))
        pulled = guided(velocity, running, euler_numbers(num_steps))
        return running.kept(euler_integrate(pulled, start, num_steps))
