"""The depth expert: views -> metric depth, by a transformer whose attention the action expert shares at every layer.

DepthVLA (arXiv 2510.13375, section III): the encoder of Depth Anything V2, a decoder that mirrors the VLM's
transformer, a linear head. Not published, and chosen here: a token's output is the log depth of its patch, pixel by
pixel (no upsampling, so that the head stays linear); tokens of all views see each other and have positions from 0; the
encoder's features are normed first, as those of encoders differ in scale. In place of the encoder may stand our stereo
encoder, whose features are pooled to the same tokens: the depth of the first view, seen with two eyes.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GemmaModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_depthvla import DepthExpertConfig
from .depth_loss import known_depth
from .layer_caches import RecordingCache, Stream
from .mixture_of_transformers import Rotary, joint_mask, run_layers, without_embedding
from .rotary_embedding import without_waiting
from .stereo_encoder import StereoEncoderModel
from .visual_tokens import SemanticEncoder, pool_to_grid

NEAR_M, FAR_M = 0.1, 10.0  # what depth is shown to the encoder, where it is its input


@dataclass
class DepthExpertOutput(ModelOutput):
    """
    depth: (B, V, H, W) float32, planar depth in m; of views that are absent, without meaning.
    log_depth: its logarithm.
    last_hidden_state: (B, V * N, width).
    """

    depth: torch.FloatTensor | None = None
    log_depth: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None


def shown_depth(depth: torch.Tensor) -> torch.Tensor:
    """Depth maps (..., H, W) in m as pictures (..., 3, H, W): 0 = near, 1 = far, in the logarithm; unknown is near."""
    scaled = (depth.clamp(min=NEAR_M) / NEAR_M).log() / math.log(FAR_M / NEAR_M)
    scaled = torch.where(known_depth(depth), scaled.clamp(max=1), 0.0)
    return scaled.unsqueeze(-3).expand(*depth.shape[:-2], 3, *depth.shape[-2:])


class DepthExpertPreTrainedModel(PreTrainedModel):
    config: DepthExpertConfig
    config_class = DepthExpertConfig
    base_model_prefix = "depth_expert"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["GemmaDecoderLayer", "Dinov2Layer", "CostFilter", "EdgeNeXtStage"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, 0.0, module.in_features**-0.5)


class DepthExpertModel(DepthExpertPreTrainedModel):
    """Views -> metric depth, and the keys and values that an action expert reads."""

    def __init__(self, config: DepthExpertConfig):
        super().__init__(config)
        self.grid = config.image_size // config.patch_size
        self.cells = self.grid * config.merge_size  # of the encoder, per side
        self.encoder = self.stereo = None
        if config.stereo_config is None:
            self.encoder = SemanticEncoder(config.encoder_config, self.cells, whole=True)
            features = self.encoder.size
        else:
            self.stereo = StereoEncoderModel(config.stereo_config)
            if config.stereo_config.features != "lookup":
                self.stereo.classifier = None  # scores disparities, which nobody asks for here
            features = config.stereo_config.num_feature_channels(config.image_size)
        self.norm = nn.LayerNorm(features)
        self.projector = nn.Linear(config.merge_size**2 * features, config.hidden_size)
        self.decoder = without_embedding(without_waiting(GemmaModel._from_config(config.decoder_config)))
        self.head = nn.Linear(config.hidden_size, config.patch_size**2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The first layers of the encoder; FSDP2 and gradient checkpointing with adapters ask for it."""
        return (self.stereo or self.encoder.tower).get_input_embeddings()

    def embed(
        self, pixel_values: torch.Tensor, view_mask: torch.Tensor | None, depth_map: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (B, V * N, width) of the views; those of absent views are alike and not to be seen.

        Args: as in `forward`.
        """
        if self.stereo is not None:
            pair = torch.stack([pixel_values[:, 0], pixel_values[:, -1]], dim=1)
            features = pool_to_grid(self.stereo(pair, output_disparity=False).features, self.cells)[:, None]
        else:
            if self.config.input == "depth":
                if depth_map is None:
                    raise ValueError("depth_map is missing: this depth expert is shown depth, not pictures")
                pixel_values = shown_depth(depth_map).to(pixel_values.dtype)
            views = pixel_values.shape[:2]
            if view_mask is None or torch.compiler.is_compiling():
                features = self.encoder(pixel_values.flatten(0, 1)).unflatten(0, views)
                if view_mask is not None:
                    features = features * view_mask[..., None, None]
            else:
                seen = self.encoder(pixel_values[view_mask])
                features = seen.new_zeros(*views, *seen.shape[1:])
                features[view_mask] = seen
        cells = self.norm(features.to(self.norm.weight.dtype))  # (B, V, cells * cells, features)
        merge = self.config.merge_size
        if merge > 1:
            cells = cells.unflatten(2, (self.grid, merge, self.grid, merge)).transpose(3, 4)
            cells = cells.flatten(4).flatten(2, 3)  # (B, V, N, merge * merge * features)
        return self.projector(cells).flatten(1, 2)

    def token_mask(self, view_mask: torch.Tensor | None) -> torch.Tensor | None:
        """(B, V * N) int64: 1 = token of a view that is there; None = all are."""
        if self.stereo is not None or view_mask is None:
            return None
        return view_mask.long().repeat_interleave(self.config.num_tokens, dim=1)

    def rotary(self, tokens: torch.Tensor) -> Rotary:
        """Cosines and sines of the positions, which count from 0."""
        return self.decoder.rotary_emb(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None])

    def run(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, Stream]:
        """Last hidden states and the stream of tokens (B, V * N, width) with `token_mask`, by themselves."""
        cache = RecordingCache()
        allowed = None if mask is None else joint_mask(mask, None)
        hidden = run_layers(self.decoder, tokens, cache, allowed, self.rotary(tokens))
        return hidden, cache.stream

    def log_depth(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, V * N, width) -> log depth (B, V, H, W) float32."""
        patch = self.config.patch_size
        cells = self.head(hidden.to(self.head.weight.dtype)).float()
        cells = cells.unflatten(1, (-1, self.grid, self.grid)).unflatten(-1, (patch, patch))  # (B, V, y, x, py, px)
        return cells.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def forward(
        self,
        pixel_values: torch.Tensor,
        view_mask: torch.Tensor | None = None,
        depth_map: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> DepthExpertOutput | tuple:
        """
        Args:
            pixel_values: (B, V, 3, H, W), RGB in [0, 1]; with a stereo encoder (B, 2, 3, H, W), the right view last.
            view_mask: (B, V) bool, the views that are there; None = all.
            depth_map: (B, V, H, W) in m, 0 = unknown, where `config.input` is "depth".
        """
        size = self.config.image_size
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != (3, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (batch, views, 3, {size}, {size})"
            )
        if self.stereo is not None and pixel_values.shape[1] != 2:
            raise ValueError(f"pixel_values has {pixel_values.shape[1]} views; a stereo encoder needs left and right")
        tokens = self.embed(pixel_values.to(self.dtype), view_mask, depth_map)
        hidden, _ = self.run(tokens, self.token_mask(view_mask))
        log_depth = self.log_depth(hidden)
        output = DepthExpertOutput(log_depth.exp(), log_depth, hidden)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["DepthExpertModel", "DepthExpertOutput"]
