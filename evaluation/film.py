"""A rollout as an animated picture: left view, right view, and the disparity that the model sees."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stereovla.evaluation.policies import Observation
from stereovla.extras import extra

with extra("report"):
    import matplotlib

PANEL_PX = 256
GAP_PX = 8
TITLE_PX = 26
CAPTION_PX = 40
PAPER, INK, GREY = (250, 250, 248), (34, 48, 60), (120, 132, 142)
FRAME_MS = 120  # a step lasts 100 ms; a little slower than life is easier to follow
LAST_FRAME_MS = 1500


def colour_disparity(disparity: np.ndarray, low: float, high: float) -> Image.Image:
    """(h, w) px -> RGB with its longer side at PANEL_PX, near = warm; `low`, `high`: ends of the colour scale, px."""
    scale = PANEL_PX / max(disparity.shape)
    size = (round(disparity.shape[1] * scale), round(disparity.shape[0] * scale))
    # enlarged before it is coloured: mixtures of two colours would show disparities that are not there
    enlarged = np.asarray(Image.fromarray(disparity.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    return Image.fromarray(colours(enlarged, low, high))


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(h, w) -> uint8 (h, w, 3): blue at `low` and below, red at `high` and above."""
    scaled = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return (matplotlib.colormaps["turbo"](scaled)[..., :3] * 255).astype(np.uint8)


def compose(panels: Sequence[tuple[str, Image.Image]], caption: str, note: str) -> Image.Image:
    """Titled square panels side by side over a caption, with a note at its right end."""
    width = len(panels) * PANEL_PX + (len(panels) + 1) * GAP_PX
    canvas = Image.new("RGB", (width, TITLE_PX + PANEL_PX + CAPTION_PX), PAPER)
    draw = ImageDraw.Draw(canvas)
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    for number, (title, picture) in enumerate(panels):
        x = GAP_PX + number * (PANEL_PX + GAP_PX)
        draw.text((x, TITLE_PX // 2), title, GREY, small, anchor="lm")
        scale = PANEL_PX / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        canvas.paste(picture, (x + (PANEL_PX - size[0]) // 2, TITLE_PX + (PANEL_PX - size[1]) // 2))
    middle = TITLE_PX + PANEL_PX + CAPTION_PX // 2
    draw.text((GAP_PX, middle), caption, INK, large, anchor="lm")
    draw.text((width - GAP_PX, middle), note, GREY, small, anchor="rm")
    return canvas


def write_gif(
    path: Path, observations: Sequence[Observation], disparities: np.ndarray | None, success: bool, step_s: float
) -> None:
    """Writes the rollout as a GIF in one step.

    Args:
        observations: every step, with both views.
        disparities: (steps, h, w) px; None leaves the third panel out.
        step_s: how long a step lasts, s.
    """
    frames = []
    if disparities is not None:
        low, high = np.percentile(disparities, [1, 99])
    for number, seen in enumerate(observations):
        panels = [("left view", Image.fromarray(seen.left)), ("right view", Image.fromarray(seen.right))]
        if disparities is not None:
            title = f"predicted disparity, {low:.0f} to {high:.0f} px"
            panels.append((title, colour_disparity(disparities[number], low, high)))
        note = f"{seen.step * step_s:.1f} s"
        if number == len(observations) - 1:
            note += ", succeeded" if success else ", failed"
        frames.append(compose(panels, f"“{seen.instruction}”", note))
    # one palette for the whole film: palettes that change from frame to frame flicker
    strip = Image.new("RGB", (frames[0].width, frames[0].height * 3))
    for place, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        strip.paste(frame, (0, place * frame.height))
    palette = strip.quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    temporary = path.with_name(path.name + ".tmp")
    indexed[0].save(temporary, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, disposal=1)
    os.replace(temporary, path)
