"""Draws the documentation's pictures of the world: `python -m stereovla.simulation.gallery docs/images`.

gallery_easy.png, gallery_default.png, gallery_geometry.png   every task of a preset at every camera range
gallery_episode.png    both views at the keyframes of one episode of the preset geometry
gallery_objects.png    the library
gallery_robots.png     every robot from outside, and both of its views, as it picks something up
"""

import argparse
import os
from pathlib import Path

import mujoco
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stereovla.processing.rotations import matrix_to_quaternion
from stereovla.simulation.camera import RANGES, orbit_pose
from stereovla.simulation.config import KEYFRAMES, PRESETS, WorldConfig
from stereovla.simulation.expert import Expert, keyframe_of
from stereovla.simulation.objects import CONTAINERS, GRASPABLES
from stereovla.simulation.robots import ROBOTS
from stereovla.simulation.scene import FIRST_OTHER, TARGET
from stereovla.simulation.world import World

CAPTION_PX = 22
GAP_PX = 4
SUPERSAMPLING = 2  # smooth edges without the cost of multi-sampling in the world itself
EPISODE_SEED, ROBOTS_SEED = 4, 8
OUTSIDE = {"azimuth_deg": 50.0, "elevation_deg": 20.0, "distance_m": 2.0}
NEAR_PX = 480  # side of the picture that an object is cut out of


def tile(picture: np.ndarray, caption: str, side: int) -> Image.Image:
    """A square picture, uint8 (n, n, 3), at `side` px under its caption."""
    result = Image.new("RGB", (side, side + CAPTION_PX), "white")
    size = max(10, side // 17)
    while ImageFont.load_default(size).getlength(caption) > side:
        size -= 1
    font = ImageFont.load_default(size)
    ImageDraw.Draw(result).text((side // 2, CAPTION_PX // 2), caption, "black", font, anchor="mm")
    result.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX), (0, CAPTION_PX))
    return result


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Tiles of one size, row by row."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + GAP_PX) - GAP_PX, len(rows) * (height + GAP_PX) - GAP_PX), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + GAP_PX), y * (height + GAP_PX)))
    return sheet


def draw_preset(preset: str, side: int) -> Image.Image:
    """The left view of every task (row) at every camera range (column)."""
    rows = []
    for number, task in enumerate(WorldConfig.from_preset(preset).tasks):
        row = []
        for column, camera_range in enumerate(RANGES):
            options = {"tasks": task, "camera_range": camera_range, "image_size": SUPERSAMPLING * side}
            world = World(WorldConfig.from_preset(preset, **options))
            world.reset(10 * number + column)
            row.append(tile(world.observe()["left"], world.instruction, side))
            world.close()
        rows.append(row)
    return grid(rows)


def draw_episode(side: int) -> Image.Image:
    """Both views when each keyframe becomes the next one to reach, and at the end."""
    world = World(WorldConfig.from_preset("geometry", tasks="stack", image_size=SUPERSAMPLING * side))
    world.reset(EPISODE_SEED)
    expert, columns, names = Expert(world), [], []

    def take(caption: str) -> None:
        seen = world.observe()
        first = world.instruction if not columns else ""
        columns.append([tile(seen["left"], caption, side), tile(seen["right"], first, side)])

    while not expert.done:
        name = keyframe_of(expert.situation())[0]
        if name not in names:
            names.append(name)
            take(f"next: {name}")
        world.step(expert.plan(1)[0][0])
        if world.steps > 120:
            raise RuntimeError(f"the expert does not solve seed {EPISODE_SEED}: choose another EPISODE_SEED")
    take("done")
    world.close()
    return grid([list(row) for row in zip(*columns, strict=True)])


def draw_robots(side: int) -> Image.Image:
    """A row for every robot: from outside, left view, right view, when the expert begins to lift."""
    rows = []
    for name in ROBOTS:
        world = World(WorldConfig.from_preset("default", robot=name, tasks="move", image_size=SUPERSAMPLING * side))
        world.reset(ROBOTS_SEED)
        expert = Expert(world)
        while not (world.held and world.lift_m > 0.03):
            world.step(expert.plan(1)[0][0])
        seen = world.observe()
        pose = orbit_pose(np.array([0.3, 0.0, 0.3]), **OUTSIDE)
        world.data.mocap_pos[0] = pose[:3, 3]
        world.data.mocap_quat[0] = matrix_to_quaternion(pose[:3, :3] @ np.diag([1.0, -1.0, -1.0]))
        world.model.cam_fovy[:] = 40.0
        mujoco.mj_kinematics(world.model, world.data)
        mujoco.mj_camlight(world.model, world.data)
        pictures = {f'robot="{name}"': world.observe()["left"], "left view": seen["left"], "right view": seen["right"]}
        rows.append([tile(picture, caption, side) for caption, picture in pictures.items()])
        world.close()
    return grid(rows)


def draw_objects(side: int) -> Image.Image:
    """Every object and container from near; objects at one scale, containers at another."""
    tiles = []
    options = {"num_objects": 1, "num_containers": 1, "fovy_deg": 30.0, "start_y": 0.35, "image_size": NEAR_PX}
    options |= {"workspace_extent": (0.02, 0.02), "tasks": "pick", "keyframes": KEYFRAMES}
    for kind in GRASPABLES + CONTAINERS:
        contained = kind in CONTAINERS
        more = {"objects": kind}
        if contained:
            more = {"objects": "dice", "containers": kind, "tasks": "move", "fovy_deg": 55.0}
            more |= {"workspace_extent": (0.10, 0.30)}
        world = World(WorldConfig.from_preset("easy", **{**options, **more}))
        world.reset(3)
        seen = world.observe(labels=True)
        rows, columns = np.nonzero(seen["segmentation"] == (FIRST_OTHER if contained else TARGET))
        reach = int(NEAR_PX * (0.24 if contained else 0.20))
        top, left = (int((v.min() + v.max()) / 2) - reach for v in (rows, columns))
        top, left = (min(max(0, v), NEAR_PX - 2 * reach) for v in (top, left))
        tiles.append(tile(seen["left"][top : top + 2 * reach, left : left + 2 * reach], kind, side))
        world.close()
    columns = 7
    return grid([tiles[start : start + columns] for start in range(0, len(tiles), columns)])


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG of 256 colours, a fifth of the size of one with all, under a temporary name, then renames it. Median
    cut, the default, would merge the small objects' colours.
    """
    temporary = path.with_suffix(".tmp")
    palette = picture.quantize(256, method=Image.Quantize.FASTOCTREE, kmeans=2)
    palette.save(temporary, "PNG", optimize=True)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=240, help="px of one view")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for preset in PRESETS:
        save(draw_preset(preset, options.side), options.folder / f"gallery_{preset}.png")
    save(draw_episode(options.side * 4 // 5), options.folder / "gallery_episode.png")
    save(draw_objects(options.side * 3 // 5), options.folder / "gallery_objects.png")
    save(draw_robots(options.side), options.folder / "gallery_robots.png")


if __name__ == "__main__":
    main()
