"""Visual tokens of a stereo pair: semantics of the left view and geometry of both, pooled to one grid, fused and
projected.

StereoVLA (arXiv 2512.21970, section III-B): SigLIP and DINOv2 patch features of the left view, FoundationStereo's
filtered cost volume of the pair
average-pooled to the same grid, concatenated along channels and mapped by an MLP to the language model's width.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersModel, SiglipVisionModel

from .stereo_encoder import StereoEncoderModel

# pixel statistics that the published encoders were trained with, for RGB in [0, 1]
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize_pixels(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(pixels - mean) / std per channel; pixels (B, 3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(1, -1, 1, 1) for v in (mean, std))
    return (pixels - mean) / std


def pool_to_grid(features: torch.Tensor, grid: int) -> torch.Tensor:
    """Average-pools (B, C, H, W) to tokens (B, grid * grid, C) in row order.

    Where the grid divides the map, a strided pooling gives the same means several times faster than the adaptive one.
    """
    height, width = features.shape[-2:]
    if height % grid == 0 and width % grid == 0:
        pooled = F.avg_pool2d(features, (height // grid, width // grid))
    else:
        pooled = F.adaptive_avg_pool2d(features, grid)
    return pooled.flatten(2).transpose(1, 2)


class SemanticEncoder(nn.Module):
    """Patch features of one image from a vision transformer's second-to-last block, without its final norm.

    The last block and the final norm of the published encoder influence nothing, so they are not built.
    """

    def __init__(self, config, tower_class, mean: tuple[float, ...], std: tuple[float, ...], num_prefix_tokens: int):
        super().__init__()
        config = copy.deepcopy(config)
        config.num_hidden_layers -= 1
        self.tower = tower_class._from_config(config)
        norm = "post_layernorm" if hasattr(self.tower, "post_layernorm") else "layernorm"
        setattr(self.tower, norm, nn.Identity())
        self.mean, self.std, self.num_prefix_tokens = mean, std, num_prefix_tokens

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, H, W) RGB in [0, 1] -> (B, patches, C)."""
        hidden = self.tower(pixel_values=normalize_pixels(pixels, self.mean, self.std)).last_hidden_state
        return hidden[:, self.num_prefix_tokens :]


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


class StereoVisualTokens(nn.Module):
    """Image pair -> visual tokens (B, grid * grid, hidden) and the stereo encoder's output.

    Channel order of the fused features: [SigLIP | DINOv2 | stereo], stereo flattened channel-major (c * D + d).
    """

    def __init__(self, config):
        super().__init__()
        self.grid = config.image_size // config.patch_size
        siglip, dino = config.siglip_config, config.dino_config
        self.siglip = SemanticEncoder(siglip, SiglipVisionModel, SIGLIP_MEAN, SIGLIP_STD, 0)
        self.dino = SemanticEncoder(dino, Dinov2WithRegistersModel, DINO_MEAN, DINO_STD, 1 + dino.num_register_tokens)
        # masked-image pre-training only; a parameter that never gets a gradient breaks distributed training
        self.dino.tower.embeddings.mask_token.requires_grad_(False)
        self.stereo = StereoEncoderModel(config.stereo_config)
        width = siglip.hidden_size + dino.hidden_size + config.stereo_config.num_feature_channels(config.image_size)
        self.projector = Projector(width, config.projector_hidden_size, config.text_config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, output_disparity: bool = False):
        """pixel_values (B, 2, 3, H, W) RGB in [0, 1], left first -> (tokens (B, N, hidden), stereo output)."""
        left = pixel_values[:, 0]
        stereo = self.stereo(pixel_values, output_disparity=output_disparity)
        semantic = [self.siglip(left), self.dino(left)]
        geometry = pool_to_grid(stereo.features, self.grid).to(semantic[0].dtype)
        return self.projector(torch.cat([*semantic, geometry], dim=-1)), stereo
