"""Frozen monocular features of FoundationStereo's side-tuning: DINOv2 and the DPT head of Depth Anything V2."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .saved_names import accept_saved_names


class MonocularPrior(nn.Module):
    """Depth Anything's features before its depth head, without gradients.

    forward: normalised RGB (B, 3, H, W) -> (B, fusion_hidden_size / 2, H/4, W/4).
    """

    SIDE_MULTIPLE = 112  # the view is resized up to a multiple of 8 patches ...
    SIDE_LIMIT = 1344  # ... but no further than this, px

    def __init__(self, config):
        super().__init__()
        # here, because only a model with this path should pay for these imports
        from transformers import AutoBackbone
        from transformers.models.depth_anything.modeling_depth_anything import DepthAnythingNeck

        # the parts, because DepthAnythingForDepthEstimation refuses every attn_implementation but "eager"
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.neck = DepthAnythingNeck(config)
        self.head = nn.Conv2d(config.fusion_hidden_size, config.fusion_hidden_size // 2, 3, padding=1)
        self.patch_size = config.patch_size
        self.register_load_state_dict_pre_hook(accept_saved_names)
        self.train()

    def train(self, mode: bool = True):
        """Nothing here ever trains. transformers gives a loaded model new parameters, which train until they are told
        not to, and then calls this.
        """
        return super().train(False).requires_grad_(False)

    def position_embedding(self, rows: int, columns: int) -> torch.Tensor:
        """(1, 1 + rows * columns, C). DINOv2's original code scales by (n + 0.1) / N, which transformers' does not:
        leaving out the 0.1 changes the features by 6.6 %."""
        table = self.backbone.embeddings.position_embeddings
        side = math.isqrt(table.shape[1] - 1)
        if rows == columns == side:
            return table
        grid = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([table[:, :1], grid.to(table.dtype)], dim=1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        multiple = self.SIDE_MULTIPLE
        size = [min(-(-side // multiple) * multiple, self.SIDE_LIMIT) for side in (height, width)]
        resized = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False).to(images.dtype)
        rows, columns = (side // self.patch_size for side in size)
        embeddings = self.backbone.embeddings
        tokens = embeddings.patch_embeddings(resized)
        tokens = torch.cat([embeddings.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.position_embedding(rows, columns)
        taps = self.backbone.config.out_indices  # counted from 1: entry i is the output of block i
        hidden = []
        for index, layer in enumerate(self.backbone.encoder.layer, start=1):
            tokens = layer(tokens)
            if index in taps:
                hidden.append(self.backbone.layernorm(tokens))
        features = self.head(self.neck(hidden, rows, columns)[-1])
        # two resizes, as published: to the resized view, then to a quarter of the given one
        features = F.interpolate(features, size=size, mode="bilinear", align_corners=True)
        return F.interpolate(features, size=(height // 4, width // 4), mode="bilinear", align_corners=True)
