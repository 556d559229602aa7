"""The tasks in words and as scenes: what is asked, with which distractors, so that every word of it matters."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from stereovla.simulation.config import WorldConfig
from stereovla.simulation.objects import CONTAINERS, KINDS, STACKABLES, TableObject, palette
from stereovla.simulation.shapes import BAND_SHARE, BOWL_FOOT_SHARE, FLOOR_M, bowl_wall

LEAST_BASE_M, LEAST_BASE_SHARE = 0.012, 0.7  # half width of what something is stacked onto; share of its foot
ROOM_M = 0.008  # between an object and the walls of its container, which are 5 mm of it
Pair = tuple[str, str | None]  # kind, colour


@dataclass(frozen=True)
class Task:
    """One thing that may be asked in a scene; indices into the scene's objects."""

    kind: str  # "pick", "stack", "move"
    target: int
    destination: int | None  # what the target is stacked onto or moved to
    instruction: str


@dataclass(frozen=True)
class Wording:
    """How a scene's tasks are put into words: with "the", and with a colour where none is needed."""

    the: bool = True
    color: bool = True


def draw_wording(wording: str, rng: np.random.Generator) -> Wording:
    """Random wording, or the full one."""
    the, color = bool(rng.integers(2)), bool(rng.integers(2))
    return Wording() if wording == "full" else Wording(the, color)


def draw_pairs(task: str, config: WorldConfig, rng: np.random.Generator) -> list[Pair]:
    """Kinds and colours of a scene for `task`, all different: the target, for "stack" what it goes onto, distractors,
    and for "move" the containers, the destination first among them.
    """
    if task == "stack":
        return _draw_stack(config, rng)
    pairs = _draw_objects(config, rng, distinct_kinds=task == "move")
    return pairs + _draw_containers(config, rng) if task == "move" else pairs


def _draw_pair(kinds: tuple[str, ...], colors: tuple[str, ...], rng: np.random.Generator) -> Pair:
    kind = kinds[rng.integers(len(kinds))]
    choices = palette(kind, colors)
    return kind, choices[rng.integers(len(choices))]


def _draw_objects(config: WorldConfig, rng: np.random.Generator, distinct_kinds: bool) -> list[Pair]:
    """Each distractor shares its kind, its colour or neither with the target, one chance in three each."""
    pairs = [_draw_pair(config.objects, config.colors, rng)]
    while len(pairs) < config.num_objects:
        kind, color = _draw_pair(config.objects, config.colors, rng)
        share = rng.integers(3)
        if share == 0 and not distinct_kinds:
            kind = pairs[0][0]
        choices = palette(kind, config.colors)
        color = pairs[0][1] if share == 1 and pairs[0][1] in choices else color
        pair = (kind, color if color in choices else choices[rng.integers(len(choices))])
        if fits(pair, pairs, config.distinct_colors, distinct_kinds):
            pairs.append(pair)
        elif not _possible(config, pairs, distinct_kinds):
            return _draw_objects(config, rng, distinct_kinds)
    return pairs


def fits(pair: Pair, pairs: list[Pair], distinct_colors: bool, distinct_kinds: bool) -> bool:
    """Whether a further object leaves all names of a scene different."""
    return (
        pair not in pairs
        and not (distinct_colors and pair[1] in [color for _, color in pairs])
        and not (distinct_kinds and pair[0] in [kind for kind, _ in pairs])
    )


def _possible(config: WorldConfig, pairs: list[Pair], distinct_kinds: bool) -> bool:
    return any(
        fits((kind, color), pairs, config.distinct_colors, distinct_kinds)
        for kind in config.objects
        for color in palette(kind, config.colors)
    )


def _draw_stack(config: WorldConfig, rng: np.random.Generator) -> list[Pair]:
    """The first distractor shares the kind of the target or of what it goes onto in another colour, or has the colour
    of one of them.
    """
    stackable = tuple(kind for kind in config.objects if kind in STACKABLES)
    while True:
        pairs = [_draw_pair(stackable, config.colors, rng) for _ in range(2)]
        for _ in range(50):
            if len(pairs) == config.num_objects:
                break
            alike = pairs[rng.integers(2)]
            kind, color = _draw_pair(config.objects, config.colors, rng)
            pair = (alike[0], color) if rng.integers(2) else (kind, alike[1])
            if pair[1] in palette(pair[0], config.colors) and fits(pair, pairs, config.distinct_colors, False):
                pairs.append(pair)
        first_two_differ = fits(pairs[1], pairs[:1], config.distinct_colors, False)
        if len(pairs) == config.num_objects and first_two_differ:
            return pairs


def _draw_containers(config: WorldConfig, rng: np.random.Generator) -> list[Pair]:
    """A second container shares the kind or the colour of the destination, where it can."""
    pairs = [_draw_pair(config.containers, config.colors, rng)]
    while len(pairs) < config.num_containers:
        kind, color = _draw_pair(config.containers, config.colors, rng)
        pair = (pairs[0][0], color) if rng.integers(2) else (kind, pairs[0][1])
        pair = pair if pair not in pairs else (kind, color)
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def possible_tasks(kind: str, objects: list[TableObject], wording: Wording) -> list[Task]:
    """Every task of a kind that can be asked in a scene without ambiguity; the one it was drawn for comes first."""
    counts = Counter(item.kind for item in objects)

    def called(item: TableObject, color: bool) -> str:
        return item.name if color or counts[item.kind] > 1 else item.kind

    indices = range(len(objects))
    graspable = [index for index in indices if not objects[index].is_container]
    if kind == "pick":
        the = "the " if wording.the else ""
        return [Task(kind, i, None, f"pick up {the}{called(objects[i], wording.color)}") for i in graspable]
    if kind == "stack":
        pairs = [(i, j) for i in graspable for j in graspable if i != j and can_rest_on(objects[i], objects[j])]
        return [Task(kind, i, j, f"stack {objects[i].name} onto {objects[j].name}") for i, j in pairs]
    containers = [index for index in indices if objects[index].is_container]
    return [
        Task(kind, i, j, f"move {objects[i].kind} to {called(objects[j], wording.color)}")
        for i in graspable
        for j in containers
        if counts[objects[i].kind] == 1 and fits_into(objects[i], objects[j])
    ]


def first_task(kind: str, objects: list[TableObject]) -> tuple[int, int | None]:
    """Target and destination that a scene of `draw_objects` was drawn for."""
    if kind == "pick":
        return 0, None
    return 0, 1 if kind == "stack" else next(i for i, item in enumerate(objects) if item.is_container)


def can_rest_on(item: TableObject, base: TableObject) -> bool:
    """Whether a cube or bowl rests safely on another one, of the sizes they have."""
    if item.kind not in STACKABLES or base.kind not in STACKABLES:
        return False
    foot = item.half_size[0] * (1.0 if item.kind == "cube" else BOWL_FOOT_SHARE)
    return base.half_size[0] >= max(LEAST_BASE_M, LEAST_BASE_SHARE * foot)


def fits_into(item: TableObject, container: TableObject) -> bool:
    """Whether an object has room in a container however it is turned."""
    return item.radius + ROOM_M <= min(container.half_size[:2])


def rest_height(item: TableObject, base: TableObject) -> float:
    """Height in m of the underside of `item` over that of `base`, when it rests upright in the middle of `base`."""
    _, _, h = base.half_size
    if base.is_container:
        return FLOOR_M
    if base.kind == "cube":
        return 2 * h
    radius = np.linspace(0.0, item.half_size[0] * (1.0 if item.kind == "bowl" else np.sqrt(2)), 60)
    thickness = bowl_wall(base.half_size[0])
    inside = [BOWL_FOOT_SHARE * base.half_size[0], base.half_size[0] - thickness]
    edge = 2 * h * (1 - BAND_SHARE)
    lower = np.where(radius < inside[1], np.interp(radius, inside, [thickness, edge]), 2 * h)
    lower[radius > base.half_size[0]] = 0.0
    upper = np.zeros(60)
    if item.kind == "bowl":
        outside = [BOWL_FOOT_SHARE * item.half_size[0], item.half_size[0]]
        upper = np.interp(radius, outside, [0.0, 2 * item.half_size[2] * (1 - BAND_SHARE)])
    return float((lower - upper).max())


def draw_objects(task: str, config: WorldConfig, rng: np.random.Generator) -> list[TableObject]:
    """The things of a scene for `task`, with sizes and supports, not yet laid out."""
    items = []
    for kind, color in draw_pairs(task, config, rng):
        scale = (1.0, 1.0) if kind in CONTAINERS else config.object_scale
        half = KINDS[kind].draw_half_size(rng, scale)
        height = float(rng.uniform(*config.support_height_m))
        stands = rng.random() < config.support_share and kind not in CONTAINERS and height > 0.002
        items.append(TableObject(kind, color, half, (0.0, 0.0), 0.0, height if stands else 0.0))
    return items
