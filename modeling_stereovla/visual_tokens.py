"""Visual tokens of a stereo pair: semantics of the left view and geometry of both, pooled to one grid, fused and
projected.

StereoVLA (arXiv 2512.21970, section III-B): SigLIP and DINOv2 patch features of the left view, FoundationStereo's
filtered cost volume of the pair average-pooled to the same grid, concatenated along channels and mapped by an MLP to
the language model's width. Each of the three may be absent, as in the paper's ablations (Table I).
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from .place_code import code_of_grid
from .running_statistics import hold_running_statistics
from .saved_names import accept_saved_names
from .stereo_encoder import StereoEncoderModel, of_channels
from .view_attention import ViewAttention
from .view_points import point_channels, points_of_disparity

# mean and standard deviation of the pixels that encoders were trained with, RGB in [0, 1]; ImageNet's unless named here
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXEL_STATISTICS = {"siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def normalize_pixels(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(pixels - mean) / std per channel; pixels (B, 3, H, W) in [0, 1]."""
    mean, std = (of_channels(values, pixels) for values in (mean, std))
    return (pixels - mean) / std


def pool_to_grid(features: torch.Tensor, grid: int) -> torch.Tensor:
    """Average-pools (B, C, H, W) to tokens (B, grid * grid, C) in row order.

    Where the grid divides the map, a strided pooling gives the same means several times faster than the adaptive one.
    """
    height, width = features.shape[-2:]
    if height == width == grid:
        pooled = features
    elif height % grid == 0 and width % grid == 0:
        pooled = F.avg_pool2d(features, (height // grid, width // grid))
    else:
        pooled = F.adaptive_avg_pool2d(features, grid)
    return pooled.flatten(2).transpose(1, 2)


class SemanticEncoder(nn.Module):
    """Features of one image on the token grid, from any vision model of transformers.

    Of a vision transformer: patch tokens of the second-to-last block without the final norm, as StereoVLA takes them;
    the last block and the final norm influence nothing, so they are not built. With `whole` they are, and the tokens
    are theirs. Of a convolutional network: its last feature map, pooled to the grid.

    Attributes:
        size: channels of a token.
    """

    def __init__(self, config, grid: int, whole: bool = False):
        super().__init__()
        self.grid = grid
        # a convolutional network states the widths of its stages
        self.size = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size
        self.is_transformer = hasattr(config, "num_attention_heads")
        self.num_prefix_tokens = 0
        config = copy.deepcopy(config)
        if self.is_transformer:
            config.num_hidden_layers -= not whole
        else:
            config._attn_implementation = "eager"  # whatever the others' is: a network without attention refuses any
        self.tower = AutoModel.from_config(config)
        if config.model_type in ("dinov2", "dinov2_with_registers"):
            self.num_prefix_tokens = 1 + getattr(config, "num_register_tokens", 0)
            # of masked-image pre-training only; a parameter that never gets a gradient breaks distributed training, and
            # a frozen one thaws when the model is loaded
            mask_token = self.tower.embeddings.mask_token.detach()
            del self.tower.embeddings.mask_token
            self.tower.embeddings.register_buffer("mask_token", mask_token)
        for norm in ("post_layernorm", "layernorm"):
            if hasattr(self.tower, norm) and not whole:
                setattr(self.tower, norm, nn.Identity())
        self.register_load_state_dict_pre_hook(accept_saved_names)
        self.mean, self.std = PIXEL_STATISTICS.get(config.model_type, IMAGENET)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, H, W) RGB in [0, 1] -> (B, grid * grid, C)."""
        if self.training:
            hold_running_statistics(self.tower)
        pixels = normalize_pixels(pixels, self.mean, self.std)
        if not self.is_transformer:
            # convolutions are a tenth faster where the channels of a pixel lie together
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        hidden = self.tower(pixel_values=pixels).last_hidden_state
        return hidden[:, self.num_prefix_tokens :] if hidden.ndim == 3 else pool_to_grid(hidden, self.grid)


class Projector(nn.Module):
    """MLP from the fused features to the language model's width, exact (erf) GELU between its three layers."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, out_features),
            nn.GELU(),
            nn.Linear(out_features, out_features),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


@dataclass
class VisualTokens:
    """What is seen of a batch of pairs.

    tokens: (B, N, hidden), or (B, 2 * N, hidden), the left view's first, where the right one has tokens of its own.
    disparity: maps (B', 1, h, w) float32, each in px of its own resolution, from the coarsest on, of the samples that
        the stereo encoder learns from; None where no disparity is asked for.
    points: (B, 3, h, w) float32, see `view_points`; None where the config has no `points_frame`.
    """

    tokens: torch.Tensor
    disparity: list[torch.Tensor] | None = None
    points: torch.Tensor | None = None


class StereoVisualTokens(nn.Module):
    """Image pair -> visual tokens (B, grid * grid, hidden), disparity and points.

    Channel order of the fused features: [semantic | spatial | stereo], as [SigLIP | DINOv2 | stereo] in the paper;
    stereo flattened channel-major (c * D + d); then those of the points where there are any. What the config leaves out
    is None. Without a stereo encoder the right view is looked at where `config.right_view` says so, by the encoders of
    the left one.
    """

    def __init__(self, config):
        super().__init__()
        self.size, self.grid = config.image_size, config.image_size // config.patch_size
        self.with_points, self.given_disparity = config.points_frame is not None, config.points_of == "given"
        semantic, spatial, stereo = config.semantic_config, config.spatial_config, config.stereo_config
        self.semantic = None if semantic is None else SemanticEncoder(semantic, self.grid)
        self.spatial = None if spatial is None else SemanticEncoder(spatial, self.grid)
        self.stereo = None if stereo is None else StereoEncoderModel(stereo)
        self.right_view = config.right_view
        self.view_attention = None
        if self.right_view == "attention":
            self.view_attention = ViewAttention(config.fused_size, self.grid)
        self.projector = Projector(config.fused_size, config.projector_hidden_size, config.text_config.hidden_size)
        self.place_code = config.place_code

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_disparity: bool = False,
        disparity_rows: torch.Tensor | None = None,
        disparity: torch.Tensor | None = None,
        point_transform: torch.Tensor | None = None,
        point_frame: torch.Tensor | None = None,
    ) -> VisualTokens:
        """
        Args:
            pixel_values: (B, 2, 3, H, W) RGB in [0, 1], left first.
            disparity_rows: (B,) bool; if given, the stereo encoder gets gradients through these samples' disparity
                alone, and disparity is returned for them alone. On the others it runs without gradients, at a third of
                the cost.
            disparity: (B, H, W), the true one in px, of which the points are where the config says so.
            point_transform, point_frame: (B, 4, 4) and (B,), see `view_points`; None = no calibration.
        """
        left, found, seen, points = pixel_values[:, 0], None, None, None
        encoders = [encoder for encoder in (self.semantic, self.spatial) if encoder is not None]
        if self.right_view is None:
            fused = [encoder(left) for encoder in encoders]
        else:
            fused = [self.both_views(encoders, pixel_values)]
        if self.stereo is not None:
            sees = self.with_points and not self.given_disparity
            features, found, seen = self.stereo_features(pixel_values, output_disparity, disparity_rows, sees)
            fused.append(pool_to_grid(features, self.grid))
        elif output_disparity or disparity_rows is not None:
            raise ValueError("disparity is asked for, but this model has no stereo encoder (stereo_config is None)")
        if self.with_points:
            if self.given_disparity:
                if disparity is None:
                    raise ValueError('disparity is missing: the points of this model (points_of "given") are of it')
                seen = F.avg_pool2d(disparity[:, None].float(), 2)
            if point_frame is None:
                point_frame = torch.zeros(len(left), dtype=torch.int64, device=left.device)
                point_transform = left.new_zeros(len(left), 4, 4)
            points = points_of_disparity(seen, point_transform, point_frame, self.size)
            fused.append(point_channels(points, point_frame, self.grid))
            points = points[:, :3]  # the pointers read places
        tokens = self.projector(torch.cat([part.to(fused[0].dtype) for part in fused], dim=-1))
        if self.place_code:
            code = code_of_grid(self.grid, tokens)
            tokens = tokens + code.repeat(tokens.shape[1] // len(code), 1)
        return VisualTokens(tokens, found, points)

    def both_views(self, encoders: list[SemanticEncoder], pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of the pair as `config.right_view` says: (B, 2 * N, C), each view's its own, or (B, N, C)."""
        views = pixel_values.flatten(0, 1)
        features = torch.cat([encoder(views) for encoder in encoders], dim=-1).unflatten(0, (-1, 2))
        return features.flatten(1, 2) if self.view_attention is None else self.view_attention(features)

    def stereo_features(
        self, pixel_values: torch.Tensor, output_disparity: bool, disparity_rows: torch.Tensor | None, sees: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None, torch.Tensor | None]:
        """Features (B, C, h, w) and disparity maps of the stereo encoder, see `forward`; and where it `sees` points,
        (B, 1, h', w') px of the view, the finest map of all samples, without gradients.
        """
        if disparity_rows is None:
            stereo = self.stereo(pixel_values, output_disparity=output_disparity or sees)
            return stereo.features, stereo.maps if output_disparity else None, self.finest(stereo) if sees else None
        found, parts, maps, rows_of = None, [], [], []
        for rows, learns in ((disparity_rows, True), (~disparity_rows, False)):
            if rows.any():
                with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                    stereo = self.stereo(pixel_values[rows], output_disparity=learns or sees)
                found = stereo.maps if learns else found
                rows_of.append(rows.nonzero()[:, 0])
                parts.append(stereo.features.detach())
                maps.append(self.finest(stereo) if sees else None)
        order = torch.cat(rows_of).argsort()
        return torch.cat(parts)[order], found, torch.cat(maps)[order] if sees else None

    def finest(self, stereo) -> torch.Tensor:
        """The finest disparity map of the stereo encoder's output, in px of the view."""
        finest = stereo.maps[-1].detach()
        return finest * (self.size / finest.shape[-1])
