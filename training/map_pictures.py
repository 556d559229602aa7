"""Pictures of predicted maps beside the true ones."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from stereovla.extras import extra

with extra("report"):
    from matplotlib.figure import Figure

ROWS = 3  # samples that a picture shows


def draw_maps(
    path: Path,
    left: torch.Tensor,
    truth: torch.Tensor,
    predicted: torch.Tensor,
    what: str,
    unit: str,
    errors: Sequence[str],
    error_maps: tuple[str, torch.Tensor] | None = None,
) -> None:
    """Writes a PNG with a row for each of the first `ROWS` samples: left view, true and predicted map, and the map of
    the errors where there is one; unknown pixels are grey.

    Args:
        left: (B, 3, H, W) in [0, 1]. truth, predicted: (B, H, W), truth 0 = unknown.
        what, unit: of the maps. errors: of each row, for its title.
        error_maps: (label, (B, H, W)).
    """
    left, truth, predicted = left[:ROWS], truth[:ROWS], predicted[:ROWS]
    rows, height, width = truth.shape
    columns = 3 if error_maps is None else 4
    figure = Figure(figsize=(3.2 * columns, 0.3 + rows * (2.8 * height / width + 0.25)), layout="constrained")
    for row, axes in enumerate(figure.subplots(rows, columns, squeeze=False)):
        known = truth[row] > 0
        seen = truth[row][known] if known.any() else predicted[row]
        limits = {"vmin": seen.min().item(), "vmax": seen.max().item(), "cmap": "turbo"}
        axes[0].imshow(left[row].permute(1, 2, 0).numpy())
        axes[1].imshow(torch.where(known, truth[row], torch.nan).numpy(), **limits)
        drawn = axes[2].imshow(predicted[row].numpy(), **limits)
        figure.colorbar(drawn, ax=list(axes[1:3]), label=unit, shrink=0.9)
        titles = ["left view", f"true {what}", f"predicted: {errors[row]}"]
        if error_maps is not None:
            label, maps = error_maps
            shown = torch.where(known, maps[row], torch.nan)
            drawn = axes[3].imshow(shown.numpy(), vmin=0, cmap="magma")
            figure.colorbar(drawn, ax=axes[3], label=label, shrink=0.9)
            titles.append("error")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title, fontsize=9)
            axis.set_facecolor("0.8")
            axis.set_xticks([])
            axis.set_yticks([])
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, path)
