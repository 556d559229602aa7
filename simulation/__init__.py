"""The world: a Franka Panda or a SCARA arm at a table, seen by a rectified stereo pair, with a scripted expert. Needs
the extra `sim` (mujoco, gymnasium).
"""

import os

# Both are read once, when the OpenGL library loads: render off screen, and let Mesa's software renderer work in the
# calling thread, which halves the CPU time of a picture.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")

from stereovla.extras import extra  # noqa: E402

with extra("sim"):
    import gymnasium  # noqa: F401
    import mujoco  # noqa: F401

from stereovla.simulation.config import WorldConfig  # noqa: E402
from stereovla.simulation.expert import Expert  # noqa: E402
from stereovla.simulation.world import World  # noqa: E402

__all__ = ["Expert", "World", "WorldConfig"]
