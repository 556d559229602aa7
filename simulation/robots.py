"""The robots that a world can have, by the name that `WorldConfig.robot` takes."""

from simulation.panda import Panda
from simulation.robot import Robot
from simulation.scara import Scara

ROBOTS: dict[str, type[Robot]] = {"panda": Panda, "scara": Scara}
