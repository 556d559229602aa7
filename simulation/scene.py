"""Builds the MuJoCo model of one episode: Panda, table, objects, stereo rig, lights, textures."""

from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from simulation.objects import TableObject

PANDA = Path(__file__).parent / "assets" / "panda.xml"
TIMESTEP_S = 0.004
TABLE_CENTER, TABLE_HALF = (0.62, 0.0), (0.42, 0.60)  # m
FLOOR_Z = -0.75
TEXTURE_PX = 128
DENSITY = 600.0  # kg / m3, soft wood: a 4 cm cube weighs 38 g
ROBOT_BIT, WORLD_BIT = 2, 1
# segmentation ids
BACKGROUND, ARM, GRIPPER, TARGET, FIRST_OTHER = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Appearance:
    """Everything about how the scene looks: sRGB colours in [0, 1], textures uint8 (128, 128, 3), light direction (3,)
    and intensities.
    """

    table: np.ndarray
    floor: np.ndarray
    pedestal_rgb: np.ndarray
    wall_rgb: np.ndarray
    light_direction: np.ndarray
    light: float
    ambient: float
    headlight: float


def smooth_noise(cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """float32 (128, 128) noise in [-1, 1] with `cells` (rows, columns) random values, linearly interpolated, wrapping
    around.
    """
    values = rng.uniform(-1, 1, cells).astype(np.float32)
    # by indexing: a matrix product would start BLAS threads, which cost 10 times as much on busy cores
    for axis in (1, 0):
        place = np.arange(TEXTURE_PX) * (cells[axis] / TEXTURE_PX)
        index, weight = place.astype(int), (place % 1.0).astype(np.float32)
        weight = weight[:, None] if axis == 0 else weight
        low, high = np.take(values, index, axis), np.take(values, (index + 1) % cells[axis], axis)
        values = low + (high - low) * weight
    return values


def draw_texture(rng: np.random.Generator) -> np.ndarray:
    """Random muted surface, uint8 (128, 128, 3): cloth, wood, stone or tiles. Low saturation keeps it apart from the
    objects' colours.
    """
    value, saturation, hue = rng.uniform(0.35, 0.85), rng.uniform(0.0, 0.15), rng.uniform(0, 2 * np.pi)
    tint = 1.0 + saturation * np.cos(hue + np.array([0.0, 2.0, 4.0]) * np.pi / 3)
    kind, contrast = rng.integers(4), rng.uniform(0.08, 0.20)
    grain = rng.random((TEXTURE_PX, TEXTURE_PX), np.float32) - 0.5
    if kind == 0:
        pattern = 0.6 * smooth_noise((24, 24), rng)
    elif kind == 1:
        pattern = 0.8 * smooth_noise((48, 2), rng) + 0.4 * smooth_noise((96, 6), rng)
    elif kind == 2:
        pattern = (
            0.7 * smooth_noise((6, 6), rng) + 0.5 * smooth_noise((16, 16), rng) + 0.4 * smooth_noise((64, 64), rng)
        )
    else:
        cell = np.arange(TEXTURE_PX) * int(rng.integers(4, 13)) // TEXTURE_PX
        pattern = np.where((cell[:, None] + cell[None]) % 2, 0.6, -0.6)
    # 256 shades of one tint: 1 ms instead of the 14 ms of arithmetic on every colour channel
    shade = np.clip(128.0 + (320.0 * contrast) * (pattern + 0.7 * grain), 0, 255).astype(np.uint8)
    palette = (value * tint)[None] * (1.0 + (np.arange(256)[:, None] - 128.0) / 320.0)
    return np.clip(255.0 * palette, 0, 255).astype(np.uint8)[shade]


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """Random look of a scene. Ambient + headlight + light stay <= 1, above which pale tables saturate."""
    tilt, azimuth = rng.uniform(0.1, 0.7), rng.uniform(-np.pi, np.pi)
    ambient, headlight = rng.uniform(0.38, 0.50), rng.uniform(0.05, 0.15)
    return Appearance(
        table=draw_texture(rng),
        floor=draw_texture(rng),
        pedestal_rgb=np.repeat(rng.uniform(0.2, 0.6), 3),
        wall_rgb=rng.uniform(0.35, 0.8) * (1.0 + rng.uniform(-0.12, 0.12, 3)),
        light_direction=np.array([np.sin(tilt) * np.cos(azimuth), np.sin(tilt) * np.sin(azimuth), -np.cos(tilt)]),
        light=rng.uniform(0.7, 1.0) * (1.0 - ambient - headlight),
        ambient=ambient,
        headlight=headlight,
    )


def load_panda() -> mujoco.MjSpec:
    """The robot alone; `build_model` adds the rest to a copy of it."""
    spec = mujoco.MjSpec.from_file(str(PANDA))
    spec.option.timestep = TIMESTEP_S
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # elliptic cones with a stiff friction direction: objects do not creep out of the grip
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10.0
    return spec


def build_model(
    panda: mujoco.MjSpec,
    objects: list[TableObject],
    table_z: float,
    appearance: Appearance,
    fovy_deg: float,
    baseline_m: float,
    image_size: tuple[int, int],
) -> mujoco.MjModel:
    """Compiles the model of one episode; `image_size` is (height, width) px. Bodies object0.. are free; body "rig" is
    a mocap body with cameras left and right.
    """
    spec = panda.copy()
    height, width = image_size
    spec.visual.global_.offheight, spec.visual.global_.offwidth = height, width
    spec.visual.quality.offsamples = 0  # multi-sampling doubles the time of a picture
    spec.visual.quality.numslices, spec.visual.quality.numstacks = 20, 8  # of balls and cans; they are small
    spec.visual.map.znear, spec.visual.map.zfar = 0.02, 6.0
    spec.stat.extent, spec.stat.center = 1.0, [0.5, 0.0, 0.0]
    spec.visual.headlight.ambient = [appearance.ambient] * 3
    spec.visual.headlight.diffuse = [appearance.headlight] * 3
    spec.visual.headlight.specular = [0.0] * 3
    world = spec.worldbody
    world.add_light(
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        pos=[0.5, 0.0, 2.0],
        dir=appearance.light_direction,
        diffuse=[appearance.light] * 3,
        specular=[0.2] * 3,
        castshadow=False,
    )
    textures = {"table": (appearance.table, 2.0), "floor": (appearance.floor, 6.0)}
    for name, (_, repeat) in textures.items():
        spec.add_texture(
            name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT,
            width=TEXTURE_PX, height=TEXTURE_PX, nchannel=3,
        )  # fmt: skip
        material = spec.add_material(name=name, texrepeat=[repeat, repeat], specular=0.0)
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name
    box, bits = mujoco.mjtGeom.mjGEOM_BOX, {"contype": WORLD_BIT, "conaffinity": WORLD_BIT | ROBOT_BIT}
    thickness = 0.02
    world.add_geom(
        name="table", type=box, size=[*TABLE_HALF, thickness], pos=[*TABLE_CENTER, table_z - thickness],
        material="table", friction=[0.8, 0.01, 0.002], **bits,
    )  # fmt: skip
    world.add_geom(type=box, size=[3.0, 3.0, 0.01], pos=[0.5, 0.0, FLOOR_Z], material="floor", contype=0, conaffinity=0)
    world.add_geom(
        type=box, size=[0.13, 0.13, -FLOOR_Z / 2], pos=[-0.03, 0.0, FLOOR_Z / 2], rgba=[*appearance.pedestal_rgb, 1.0],
        contype=0, conaffinity=0,
    )  # fmt: skip
    # a room, so that every pixel of every view has a depth below 6 m
    for position, half in (
        ([-1.5, 0, 0], [0.01, 2.5, 2.0]),
        ([0.5, 2.5, 0], [2.0, 0.01, 2.0]),
        ([0.5, -2.5, 0], [2.0, 0.01, 2.0]),
    ):
        world.add_geom(type=box, size=half, pos=position, rgba=[*appearance.wall_rgb, 1.0], contype=0, conaffinity=0)
    for index, item in enumerate(objects):
        add_object(spec, f"object{index}", item, table_z, bits)
    rig = world.add_body(name="rig", mocap=True)
    for name, x in (("left", -baseline_m / 2), ("right", baseline_m / 2)):
        rig.add_camera(name=name, pos=[x, 0.0, 0.0], fovy=fovy_deg)
    model = spec.compile()
    # written into the compiled model, since MjSpec takes pixels as a Python list only
    for name, (pixels, _) in textures.items():
        address = model.tex_adr[model.texture(name).id]
        model.tex_data[address : address + pixels.size] = pixels.ravel()
    return model


def add_object(spec: mujoco.MjSpec, name: str, item: TableObject, table_z: float, bits: dict[str, int]) -> None:
    """Adds one free body, resting on the table. A can collides as a 20-sided prism, since a primitive cylinder creeps
    out of the grip, and is drawn as a cylinder, which the renderer has ready-made."""
    body = spec.worldbody.add_body(
        name=name,
        pos=[*item.xy, table_z + item.half_size[2]],
        quat=[np.cos(item.yaw / 2), 0.0, 0.0, np.sin(item.yaw / 2)],
    )
    body.add_freejoint()
    # torsional and rolling friction (m) keep a ball where it was put
    condim = 6 if item.shape == "ball" else 4
    geom = {"density": DENSITY, "condim": condim, "friction": [1.0, 0.01, 0.003], "rgba": [*item.rgb, 1.0], **bits}
    if item.shape == "ball":
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[item.half_size[0], 0, 0], **geom)
    elif item.shape == "can":
        angle = np.arange(20) * (2 * np.pi / 20)
        ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * item.half_size[0]
        points = np.concatenate([np.insert(ring, 2, z, axis=1) for z in (-item.half_size[2], item.half_size[2])])
        spec.add_mesh(name=name, uservert=points.ravel())
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name, group=3, **geom)
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[item.half_size[0], item.half_size[2], 0], rgba=geom["rgba"],
            contype=0, conaffinity=0, mass=0,
        )  # fmt: skip
    else:
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=list(item.half_size), **geom)
