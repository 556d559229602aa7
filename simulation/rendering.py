"""Stereo pictures, depth and segmentation of a MuJoCo model through EGL."""

import os

import mujoco
import numpy as np

EGL_HELP = (
    "MuJoCo cannot open an off-screen OpenGL context with MUJOCO_GL={backend!r} ({reason}). On Debian or Ubuntu without a GPU:\n"
    "    apt-get install -y libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri"
)


def open_context(width: int, height: int) -> mujoco.GLContext:
    """An off-screen OpenGL context. EGL is asked for directly, since `mujoco.GLContext` is chosen when mujoco is first imported, perhaps before MUJOCO_GL was set."""
    if os.environ.get("MUJOCO_GL", "egl") == "egl":
        from mujoco.egl import GLContext

        return GLContext(width, height)
    return mujoco.GLContext(width, height)


class StereoRenderer:
    """Renders the cameras "left" and "right" of one model; colour and depth come from one pass. One instance per model; close() frees the OpenGL context."""

    def __init__(self, model: mujoco.MjModel, height: int, width: int):
        self.model, self.height, self.width = model, height, width
        try:
            self._gl = open_context(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # the bindings raise whatever the GL loader raised: ImportError, AttributeError, RuntimeError, EGLError
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(EGL_HELP.format(backend=os.environ.get("MUJOCO_GL"), reason=reason)) from error
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_SKYBOX):
            self._scene.flags[flag] = False
        self._options = mujoco.MjvOption()
        self._cameras = []
        for name in ("left", "right"):
            camera = mujoco.MjvCamera()
            camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(name).id
            self._cameras.append(camera)
        near, far = model.vis.map.znear * model.stat.extent, model.vis.map.zfar * model.stat.extent
        self._near, self._far = near, far

    def update(self, data: mujoco.MjData) -> None:
        """Takes over the positions of `data`; call before render."""
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self.model, data, self._options, None, self._cameras[0], mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )

    def _aim(self, data: mujoco.MjData, view: int) -> None:
        mujoco.mjv_updateCamera(self.model, data, self._cameras[view], self._scene)

    def color(self, data: mujoco.MjData, view: int, depth: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 (H, W, 3) of view 0 (left) or 1 (right) and, if asked, planar depth float32 (H, W) in m."""
        self._aim(data, view)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        rgb = np.empty((self.height, self.width, 3), np.uint8)
        raw = np.empty((self.height, self.width), np.float32) if depth else None
        mujoco.mjr_readPixels(rgb, raw, self._viewport, self._context)
        return np.ascontiguousarray(rgb[::-1]), None if raw is None else self._to_meters(raw[::-1])

    def _to_meters(self, raw: np.ndarray) -> np.ndarray:
        # the zero-far depth map runs from 1 at the near plane to 0 at the far plane
        return (self._near * self._far / (self._near + raw.astype(np.float64) * (self._far - self._near))).astype(np.float32)

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
        """Frees the OpenGL objects: first MuJoCo's, then the context they live in."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = None
