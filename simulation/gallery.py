"""Draws a picture of the world for people: `python -m simulation.gallery docs/images/world.png --seeds 30 9 23`."""

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simulation.camera import RANGES
from simulation.expert import Expert
from simulation.world import World, WorldConfig

CAPTION_PX = 34


def draw_scene(seed: int, camera_range: str, side: int, steps: int) -> Image.Image:
    """One column: the instruction, the left and the right view of a seed after `steps` steps of the expert."""
    # rendered at twice the size and averaged: smooth edges without the cost of multi-sampling in the world itself
    world = World(WorldConfig(camera_range=camera_range, image_size=2 * side))
    world.reset(seed)
    for _ in range(steps):
        world.step(Expert(world).plan(1)[0][0])
    seen = world.observe()
    column = Image.new("RGB", (side, 2 * side + CAPTION_PX), "white")
    font = ImageFont.load_default(20)
    ImageDraw.Draw(column).text((side // 2, CAPTION_PX // 2), world.instruction, "black", font, anchor="mm")
    for row, view in enumerate(("left", "right")):
        blocks = seen[view].reshape(side, 2, side, 2, 3).mean((1, 3)).round().astype(np.uint8)
        column.paste(Image.fromarray(blocks), (0, CAPTION_PX + row * side))
    world.close()
    return column


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 9, 23])
    parser.add_argument("--ranges", nargs="+", choices=list(RANGES), default=["small", "medium", "large"])
    parser.add_argument("--steps", type=int, nargs="+", default=[11, 0, 6], help="of the expert before the picture")
    parser.add_argument("--side", type=int, default=448, help="px of one view")
    options = parser.parse_args()
    if not len(options.seeds) == len(options.ranges) == len(options.steps):
        parser.error("--seeds, --ranges and --steps need the same number of values, one per column")
    columns = [
        draw_scene(seed, camera_range, options.side, steps)
        for seed, camera_range, steps in zip(options.seeds, options.ranges, options.steps, strict=True)
    ]
    picture = Image.new("RGB", (options.side * len(columns), columns[0].height), "white")
    for index, column in enumerate(columns):
        picture.paste(column, (index * options.side, 0))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".tmp")
    picture.save(temporary, "PNG", optimize=True)
    os.replace(temporary, options.output)


if __name__ == "__main__":
    main()
