"""Which simulator an episode runs in: that of its config."""

from typing import Any

from stereovla.simulation import Expert, World, WorldConfig
from stereovla.simulation.base_world import BaseWorld
from stereovla.simulation.robot import STEP_S

OSC_STEP_S = 0.05  # of LIBERO's own control


def make_world(config: Any) -> BaseWorld:
    """Our own world of a WorldConfig, or LIBERO's of a LiberoConfig."""
    if isinstance(config, WorldConfig):
        return World(config)
    from stereovla.simulation.libero import LiberoWorld  # needs the extra `libero`

    return LiberoWorld(config)


def make_expert(world: BaseWorld) -> Any:
    """The scripted expert of a world."""
    if isinstance(world, World):
        return Expert(world)
    from stereovla.simulation.libero import LiberoExpert

    return LiberoExpert(world)


def saved_step_s(saved: dict[str, Any]) -> float:
    """How long a step lasts in the world of saved options, s; also where that world is not installed."""
    return OSC_STEP_S if saved.get("world.control") == "osc" else STEP_S


def saved_config(saved: dict[str, Any]) -> Any:
    """The world's config of saved options, in which its fields are called world.FIELD."""
    values = {key.removeprefix("world."): value for key, value in saved.items() if key.startswith("world.")}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if "suite" not in values:
        return WorldConfig(**values)
    from stereovla.simulation.libero import LiberoConfig

    return LiberoConfig(**values)
