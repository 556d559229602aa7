"""Scenes and words: every instruction fits one object, distractors make every word matter, hands find room."""

from dataclasses import replace

import numpy as np
import pytest

from stereovla.simulation.config import WorldConfig
from stereovla.simulation.layout import FINGER_REACH_M, draw_layout, far_enough, occupied_radius, rectangle, top
from stereovla.simulation.objects import GRASPABLES, KINDS, STACKABLES, TableObject
from stereovla.simulation.tasks import (
    Wording,
    can_rest_on,
    draw_objects,
    draw_pairs,
    first_task,
    fits_into,
    possible_tasks,
    rest_height,
)

CENTER, EXTENT = (0.5, 0.0), (0.30, 0.40)


def thing(kind: str, color: str | None = "red", scale: float = 1.0, **values) -> TableObject:
    half = tuple(scale * size for size in KINDS[kind].low)
    return TableObject(kind, color, half, (0.5, 0.0), 0.0, **values)


@pytest.mark.parametrize("task", ["pick", "stack", "move"])
@pytest.mark.parametrize("wording", [Wording(), Wording(False, False)])
def test_instructions_are_unambiguous(task, wording):
    config = WorldConfig(num_objects=4)
    for seed in range(150):
        objects = draw_objects(task, config, np.random.default_rng(seed))
        assert len({item.name for item in objects}) == len(objects)
        tasks = possible_tasks(task, objects, wording)
        assert len({item.instruction for item in tasks}) == len(tasks)
        for item in tasks:
            words = item.instruction.split()
            for index, role in ((item.target, "target"), (item.destination, "destination")):
                if index is None:
                    continue
                part = words[: words.index("onto" if task == "stack" else "to")] if task != "pick" else words
                part = part if role == "target" else words[len(part) :]
                kind, color = objects[index].kind, objects[index].color
                named = [
                    o for o in objects if o.kind in part and (o.color in part or not {"red", "green", "blue", "yellow",
                    "orange", "purple"} & set(part))
                ]  # fmt: skip
                assert named == [objects[index]], (item.instruction, [o.name for o in objects], kind, color)


def test_wording():
    objects = [thing("cube"), thing("lemon", None), thing("can", "blue"), thing("can", "red"), thing("tray", "blue")]
    full = [task.instruction for task in possible_tasks("pick", objects, Wording())]
    assert full == ["pick up the red cube", "pick up the lemon", "pick up the blue can", "pick up the red can"]
    short = [task.instruction for task in possible_tasks("pick", objects, Wording(False, False))]
    assert short == ["pick up cube", "pick up lemon", "pick up blue can", "pick up red can"]
    moves = [task.instruction for task in possible_tasks("move", objects, Wording(True, True))]
    assert moves == ["move cube to blue tray", "move lemon to blue tray"]
    assert possible_tasks("move", objects, Wording(True, False))[0].instruction == "move cube to tray"
    both = [thing("tray", "red"), *objects]
    assert possible_tasks("move", both, Wording(True, False))[0].instruction == "move cube to red tray"
    stacks = possible_tasks("stack", [thing("bowl"), thing("cube", "blue"), thing("can")], Wording(False, False))
    assert [task.instruction for task in stacks] == ["stack red bowl onto blue cube", "stack blue cube onto red bowl"]


def test_distractors_share_colour_or_kind():
    config = WorldConfig.from_preset("easy")
    kind = color = 0
    for seed in range(300):
        pairs = draw_pairs("pick", config, np.random.default_rng(seed))
        kind += any(pair[0] == pairs[0][0] for pair in pairs[1:])
        color += any(pair[1] == pairs[0][1] for pair in pairs[1:])
    assert min(kind, color) > 100
    config, confused = WorldConfig(), {"kind": 0, "color": 0, "container": 0}
    for seed in range(200):
        target, base, other = draw_pairs("stack", config, np.random.default_rng(seed))
        assert target[0] in STACKABLES and base[0] in STACKABLES
        confused["kind"] += other[0] in (target[0], base[0])
        confused["color"] += other[1] in (target[1], base[1])
        *things, first, second = draw_pairs("move", config, np.random.default_rng(seed))
        assert len({kind for kind, _ in things}) == len(things)
        confused["container"] += first[0] == second[0] or first[1] == second[1]
    assert min(confused.values()) > 60 and confused["container"] > 150


def test_every_kind_becomes_a_target():
    config = WorldConfig(tasks=("pick",))
    first = {draw_pairs("pick", config, np.random.default_rng(seed))[0][0] for seed in range(400)}
    assert first == set(GRASPABLES)


def test_distinct_colors():
    config = WorldConfig.from_preset("easy", distinct_colors=True, num_objects=5)
    for seed in range(50):
        pairs = draw_pairs("pick", config, np.random.default_rng(seed))
        assert len({color for _, color in pairs}) == 5


@pytest.mark.parametrize("task", ["pick", "stack", "move"])
def test_layouts_leave_room_for_the_hand(task):
    config, found = WorldConfig.from_preset("geometry"), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        items = draw_layout(draw_objects(task, config, rng), CENTER, EXTENT, rng)
        if items is None:
            continue
        found += 1
        for index, item in enumerate(items):
            assert np.all(np.abs(np.array(item.xy) - CENTER) <= np.array(EXTENT) / 2)
            for other in items[:index]:
                distance = np.hypot(*np.subtract(item.xy, other.xy))
                if not item.is_container and not other.is_container:
                    assert distance >= FINGER_REACH_M + max(item.radius, other.radius)
                    if abs(top(item) - top(other)) > 0.08:  # the hand passes beside the taller one
                        assert distance >= 0.105 + min(item.radius, other.radius)
    assert found > 30


def test_containers_do_not_overlap():
    tray = thing("tray")
    reach = 2 * rectangle(tray)
    assert not far_enough(tray, replace(tray, xy=(0.5 + reach[0], 0.0)))
    assert far_enough(tray, replace(tray, xy=(0.5 + reach[0] + 0.04, 0.0)))
    assert occupied_radius(thing("cube", support_m=0.05)) > occupied_radius(thing("cube"))


def test_no_room_is_said():
    items = [thing("bar", color) for color in ("red", "green", "blue", "yellow")]
    assert draw_layout(items, CENTER, (0.05, 0.05), np.random.default_rng(0)) is None


def test_what_rests_on_what():
    assert can_rest_on(thing("cube"), thing("cube", scale=0.9))
    assert not can_rest_on(thing("cube", scale=2.0), thing("cube"))
    assert not can_rest_on(thing("ball"), thing("cube")) and not can_rest_on(thing("cube"), thing("ball"))
    assert fits_into(thing("cube"), thing("plate")) and not fits_into(thing("bar", scale=1.5), thing("box"))
    assert rest_height(thing("bowl"), thing("cube")) == pytest.approx(0.030)
    # a small cube stands on a bowl's floor, a wide one on its rim, the same bowl in between
    bowl = thing("bowl")
    small, same, wide = (rest_height(item, bowl) for item in (thing("cube", scale=0.3), bowl, thing("cube", scale=1.9)))
    assert small < 0.006 < same < wide == pytest.approx(2 * bowl.half_size[2])


def test_the_first_task_is_the_drawn_one():
    for task in ("pick", "stack", "move"):
        objects = draw_objects(task, WorldConfig(), np.random.default_rng(3))
        target, destination = first_task(task, objects)
        assert target == 0 and (destination is None) == (task == "pick")
        if task == "move":
            assert objects[destination].is_container and not objects[destination - 1].is_container


def test_objects_lie_at_any_yaw_if_the_world_says_so():
    items = [thing("bar"), thing("ball", "blue"), thing("tray", "green")]
    few, any_yaw = (
        [draw_layout(items, CENTER, (0.5, 0.6), np.random.default_rng(seed), any_yaw) for seed in range(60)]
        for any_yaw in (False, True)
    )
    limits = {item.kind: max(abs(scene[number].yaw) for scene in few) for number, item in enumerate(items)}
    reached = {item.kind: max(abs(scene[number].yaw) for scene in any_yaw) for number, item in enumerate(items)}
    assert limits["bar"] <= 0.9 and limits["ball"] == 0 and limits["tray"] <= 0.25
    assert 3 < reached["bar"] <= np.pi and reached["tray"] <= 0.25
    assert [[item.xy for item in scene] for scene in few] == [[item.xy for item in scene] for scene in any_yaw]
