"""Stereo pictures, depth and segmentation of a MuJoCo model through EGL."""

import atexit
import math
import os
import weakref
from collections.abc import Sequence

import mujoco
import numpy as np

from stereovla.simulation.scene import MESH_SLOTS

HIDDEN_GROUP = 5  # MuJoCo shows groups 0 to 2 by default
EGL_HELP = (
    "MuJoCo cannot open an off-screen OpenGL context with MUJOCO_GL={backend!r} ({reason}).\n"
    "On Debian or Ubuntu without a GPU:\n"
    "    apt-get install -y libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri"
)


def open_context(width: int, height: int) -> mujoco.GLContext:
    """An off-screen OpenGL context. EGL is asked for directly, since `mujoco.GLContext` is chosen when mujoco is first
    imported, perhaps before MUJOCO_GL was set.
    """
    if os.environ.get("MUJOCO_GL", "egl") == "egl":
        from mujoco.egl import GLContext

        return GLContext(width, height)
    return mujoco.GLContext(width, height)


def free_context(gl: mujoco.GLContext, context: mujoco.MjrContext) -> None:
    """Frees MuJoCo's OpenGL objects while their own context is current, then that context."""
    gl.make_current()
    context.free()
    gl.free()


class StereoRenderer:
    """Renders cameras of a model, the pair first; colour and depth come from one pass. close() frees the OpenGL
    context. Use it from one thread only.

    Making a context costs 60 to 250 ms, so one serves model after model: load() hands over the next one, which must
    have the same visible meshes but for those in the objects' slots, and the same number and size of textures.

    Args:
        effects: shadows, reflections and sky, as far as the model has them.
        hidden_groups: of geoms that are not drawn.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        height: int,
        width: int,
        cameras: Sequence[str] = ("left", "right"),
        *,
        effects: bool = False,
        hidden_groups: Sequence[int] = (),
        max_geoms: int = 400,
    ):
        self.height, self.width, self._names = height, width, tuple(cameras)
        try:
            self._gl = open_context(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # whatever the GL loader raised: ImportError, AttributeError, RuntimeError, EGLError
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(EGL_HELP.format(backend=os.environ.get("MUJOCO_GL"), reason=reason)) from error
        # Also when it is garbage collected: MuJoCo would delete its objects by number in whatever context is current,
        # and so silently spoil the pictures of the next renderer.
        self._free = weakref.finalize(self, free_context, self._gl, self._context)
        # At the end of the process before MuJoCo closes EGL, as later registered functions come first. Left to itself
        # it comes with the first finalizer that anything made, perhaps after that, and a run ends with a traceback.
        self._free.atexit = False
        atexit.register(self._free)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(model, maxgeom=max_geoms)
        for flag in (
            ()
            if effects
            else (
                mujoco.mjtRndFlag.mjRND_SHADOW,
                mujoco.mjtRndFlag.mjRND_REFLECTION,
                mujoco.mjtRndFlag.mjRND_SKYBOX,
            )
        ):
            self._scene.flags[flag] = False
        self._options = mujoco.MjvOption()
        self._options.geomgroup[list(hidden_groups)] = 0
        self._adopt(model)

    def load(self, model: mujoco.MjModel) -> None:
        """Takes over another model of the same meshes and texture sizes."""
        if model.ntex != self.model.ntex or not np.array_equal(model.tex_adr, self.model.tex_adr):
            raise ValueError(
                f"the new model has {model.ntex} textures of other sizes than the {self.model.ntex} before: "
                "make a new StereoRenderer"
            )
        self._gl.make_current()
        for texture in range(model.ntex):
            mujoco.mjr_uploadTexture(model, self._context, texture)
        for slot in range(MESH_SLOTS):
            mujoco.mjr_uploadMesh(model, self._context, model.mesh(f"slot{slot}").id)
        self._adopt(model)

    def _adopt(self, model: mujoco.MjModel) -> None:
        self.model = model
        self._cameras = []
        for name in self._names:
            camera = mujoco.MjvCamera()
            camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(name).id
            self._cameras.append(camera)
        self._near, self._far = model.vis.map.znear * model.stat.extent, model.vis.map.zfar * model.stat.extent
        self._groups = model.geom_group.copy()

    def update(self, data: mujoco.MjData) -> None:
        """Takes over the positions of `data`; call before color and geom_ids."""
        self._gl.make_current()
        self.model.geom_group[:] = np.where(self._seen(data), self._groups, HIDDEN_GROUP)
        mujoco.mjv_updateScene(
            self.model, data, self._options, None, self._cameras[0], mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self.model.geom_group[:] = self._groups  # which rays, and the next renderer of this model, go by

    def _seen(self, data: mujoco.MjData) -> np.ndarray:
        """bool (ngeom,): the geoms whose bounding sphere a camera can see. Not most of the arm, most of the triangles;
        without the others the pictures do not change.
        """
        radius = self.model.geom_rbound
        seen = radius <= 0  # planes have no bounding sphere
        for camera in self._cameras:
            # the view cone that holds the whole picture, by the half angle of its corner
            fovy = math.radians(float(self.model.cam_fovy[camera.fixedcamid]))
            half_angle = math.atan(math.tan(fovy / 2) * math.hypot(1.0, self.width / self.height))
            offset = data.geom_xpos - data.cam_xpos[camera.fixedcamid]
            distance = np.maximum(np.linalg.norm(offset, axis=1), 1e-9)
            along = -(offset @ data.cam_xmat[camera.fixedcamid].reshape(3, 3)[:, 2]) / distance
            widening = np.arcsin(np.minimum(1.0, radius / distance))
            seen |= (np.arccos(np.clip(along, -1.0, 1.0)) < half_angle + widening) | (distance <= radius)
        return seen

    def _aim(self, data: mujoco.MjData, view: int) -> None:
        mujoco.mjv_updateCamera(self.model, data, self._cameras[view], self._scene)

    def color(self, data: mujoco.MjData, view: int, depth: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 (H, W, 3) of a view, 0 (left), 1 (right), ..., and, if asked, planar depth float32 (H, W) in m."""
        self._aim(data, view)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        rgb = np.empty((self.height, self.width, 3), np.uint8)
        raw = np.empty((self.height, self.width), np.float32) if depth else None
        mujoco.mjr_readPixels(rgb, raw, self._viewport, self._context)
        return np.ascontiguousarray(rgb[::-1]), None if raw is None else self._to_meters(raw[::-1])

    def _to_meters(self, raw: np.ndarray) -> np.ndarray:
        # the zero-far depth map runs from 1 at the near plane to 0 at the far plane
        near, far = self._near, self._far
        return (near * far / (near + raw.astype(np.float64) * (far - near))).astype(np.float32)

    def geom_ids(self, data: mujoco.MjData, view: int) -> np.ndarray:
        """int32 (H, W): geom index per pixel, -1 where there is none."""
        self._aim(data, view)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = True
        self._scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = False
        rgb = np.empty((self.height, self.width, 3), np.uint8)
        mujoco.mjr_readPixels(rgb, None, self._viewport, self._context)
        segment = rgb[::-1].astype(np.int32) @ np.array([1, 256, 65536])  # 0: nothing, else scene geom + 1
        table = np.full(self._scene.ngeom + 1, -1, np.int32)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM and geom.segid >= 0:
                table[geom.segid + 1] = geom.objid
        return table[segment]

    def close(self) -> None:
        """Frees the OpenGL objects."""
        self._free()
