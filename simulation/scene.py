"""Builds the MuJoCo model of one episode: robot, table, objects, stereo rig, lights, textures."""

from pathlib import Path

import mujoco
import numpy as np

from stereovla.processing.rotations import matrix_to_quaternion
from stereovla.simulation.appearance import TEXTURE_PX, Appearance
from stereovla.simulation.layout import block_half
from stereovla.simulation.objects import KINDS, TableObject
from stereovla.simulation.shapes import Solid

ASSETS = Path(__file__).parent / "assets"
TIMESTEP_S = 0.004
TABLE_CENTER, TABLE_HALF = (0.62, 0.0), (0.42, 0.60)  # m
FLOOR_Z = -0.75
DENSITY = 600.0  # kg / m3, soft wood: a 4 cm cube weighs 38 g
CONTAINER_DENSITY = 2000.0  # a tray of 0.3 kg stays where it is when something is put into it
COLLISION_GROUP = 3  # not drawn
MARK_RGBA = [0.08, 0.08, 0.08, 1.0]
# Meshes that are drawn, one per object: every model has as many, so that one renderer serves model after model.
MESH_SLOTS = 7
EMPTY_SLOT = (
    np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]) * 0.01,
    np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
)
ROBOT_BIT, WORLD_BIT = 2, 1
# segmentation ids
BACKGROUND, ARM, GRIPPER, TARGET, FIRST_OTHER = 0, 1, 2, 3, 4


def load_robot(model_file: str) -> mujoco.MjSpec:
    """The robot alone, from its file in `assets/`; `build_model` adds the rest to a copy of it."""
    spec = mujoco.MjSpec.from_file(str(ASSETS / model_file))
    spec.option.timestep = TIMESTEP_S
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # elliptic cones with a stiff friction direction: objects do not creep out of the grip
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10.0
    return spec


def build_model(
    robot: mujoco.MjSpec,
    objects: list[TableObject],
    table_z: float,
    appearance: Appearance,
    image_size: tuple[int, int],
) -> mujoco.MjModel:
    """Compiles the model of one episode; `image_size` is (height, width) px. Bodies object0.. are free; body "rig" is
    a mocap body with cameras left and right, which `World.redraw_camera` sets up.
    """
    spec = robot.copy()
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
    for slot in range(MESH_SLOTS):
        mesh = KINDS[objects[slot].kind].geometry(objects[slot].half_size).mesh if slot < len(objects) else None
        add_mesh(spec, f"slot{slot}", *(mesh or EMPTY_SLOT))
    for index, item in enumerate(objects):
        if item.support_m > 0:
            world.add_geom(
                name=f"block{index}", type=box, size=[*block_half(item), item.support_m / 2],
                pos=[*item.xy, table_z + item.support_m / 2], quat=turned(item.yaw),
                rgba=[*appearance.block_rgb, 1.0], friction=[0.8, 0.01, 0.002], **bits,
            )  # fmt: skip
        add_object(spec, index, item, table_z, bits)
    rig = world.add_body(name="rig", mocap=True)
    for name in ("left", "right"):
        rig.add_camera(name=name)
    model = spec.compile()
    # written into the compiled model, since MjSpec takes pixels as a Python list only
    for name, (pixels, _) in textures.items():
        address = model.tex_adr[model.texture(name).id]
        model.tex_data[address : address + pixels.size] = pixels.ravel()
    return model


def turned(yaw: float) -> list[float]:
    """Quaternion wxyz of a turn about z."""
    return [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]


def add_mesh(spec: mujoco.MjSpec, name: str, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Adds a mesh that is only drawn; as a shell, since open or thin surfaces have no volume to speak of."""
    mesh = spec.add_mesh(name=name, uservert=vertices.ravel(), userface=faces.ravel())
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL


def add_object(spec: mujoco.MjSpec, index: int, item: TableObject, table_z: float, bits: dict[str, int]) -> None:
    """Adds the free body "object{index}", resting on the table or on its block."""
    kind = KINDS[item.kind]
    geometry = kind.geometry(item.half_size)
    body = spec.worldbody.add_body(
        name=f"object{index}",
        pos=[*item.xy, table_z + item.support_m + item.half_size[2]],
        quat=turned(item.yaw),
    )
    body.add_freejoint()
    rgba = [*item.rgb, 1.0]
    # torsional and rolling friction (m) keep a ball where it was put
    contact = {
        "density": CONTAINER_DENSITY if item.is_container else DENSITY,
        "condim": 6 if kind.rolls else 4,
        "friction": [1.0, 0.01, 0.003],
        "group": 0 if geometry.mesh is None else COLLISION_GROUP,
        "rgba": rgba,
        **bits,
    }
    for number, solid in enumerate(geometry.solids):
        add_solid(spec, body, f"object{index}_{number}", solid, contact)
    drawn = {"contype": 0, "conaffinity": 0, "mass": 0}
    if geometry.mesh is not None:
        # a mesh geom's pose is relative to the mesh's own frame, which the compiler accounts for
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname=f"slot{index}", rgba=rgba, **drawn)
    for mark in geometry.marks:
        add_solid(spec, body, "", mark, {**drawn, "rgba": MARK_RGBA})


def add_solid(spec: mujoco.MjSpec, body: mujoco.MjsBody, name: str, solid: Solid, options: dict) -> None:
    """Adds a convex geom to a body; a hull needs a name of its own."""
    placed = dict(options, pos=solid.position)
    if solid.rotation is not None:
        placed["quat"] = matrix_to_quaternion(solid.rotation)
    if solid.kind == "hull":
        spec.add_mesh(name=name, uservert=solid.points.ravel())
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name, **placed)
    elif solid.kind == "sphere":
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[solid.size[0], 0, 0], **placed)
    else:
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=solid.size, **placed)
