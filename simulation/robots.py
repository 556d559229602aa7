"""The robots that a world can have, by the name that `WorldConfig.robot` takes."""

from stereovla.simulation.panda import Panda
from stereovla.simulation.robot import Robot
from stereovla.simulation.scara import Scara

ROBOTS: dict[str, type[Robot]] = {"panda": Panda, "scara": Scara}
