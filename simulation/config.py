"""What is random in the world, and how far: one typed config, and three presets of it."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from stereovla.simulation.camera import RANGES
from stereovla.simulation.objects import COLORS, CONTAINERS, GRASPABLES, PRIMITIVES, SMALL_OR_THIN, STACKABLES
from stereovla.simulation.robots import ROBOTS

TASKS = ("pick", "stack", "move")
WORDINGS = ("full", "varied")
KEYFRAMES = ("pre_grasp", "grasp", "lift", "pre_place", "place")  # in the order in which they are reached
MAX_OBJECTS = 5
MAX_CONTAINERS = 2
Range = tuple[float, float]
# allowed values of every range, with their unit; a range may also be given as one number, which is then fixed
LIMITS: dict[str, tuple[float, float, str]] = {
    "object_scale": (0.2, 3.0, ""),
    "support_height_m": (0.0, 0.10, "m"),
    "table_height_m": (-0.2, 0.2, "m"),
    "texture_brightness": (0.0, 1.0, ""),
    "texture_saturation": (0.0, 1.0, ""),
    "texture_contrast": (0.0, 1.0, ""),
    "wall_brightness": (0.0, 1.0, ""),
    "ambient_light": (0.0, 0.6, ""),
    "headlight": (0.0, 0.4, ""),
    "directional_light": (0.0, 1.0, ""),
    "light_tilt_rad": (0.0, 1.3, "rad"),
    "fovy_deg": (1.0, 119.0, "deg"),
    "baseline_m": (0.005, 0.5, "m"),
    "vertical_misalignment_px": (-20.0, 20.0, "px"),
    "right_gain": (0.1, 3.0, ""),
    "right_offset": (-128.0, 128.0, "levels of 255"),
    "right_color": (0.1, 3.0, ""),
    "noise_std": (0.0, 50.0, "levels of 255"),
    "start_x": (0.2, 0.7, "m"),
    "start_y": (-0.5, 0.5, "m"),
    "start_height_m": (0.05, 0.6, "m"),
    "start_yaw_rad": (-1.5, 1.5, "rad"),
}


class Pictures:
    """Height and width of a config's `image_size`: a side, or (height, width), px."""

    image_size: int | tuple[int, int]

    @property
    def height(self) -> int:
        """Image height in px."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        """Image width in px."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]


@dataclass
class WorldConfig(Pictures):
    """What is random, and how far. A range is (low, high), or one number for a fixed value; lengths in m. The same
    config and seed give the same bytes. The defaults are the preset "default".

    Attributes:
        robot: "panda" or "scara"; see `simulation.robots`. It has cameras of its own: `from_preset` gives them.
        tasks: which tasks episodes ask for, each equally often: "pick", "stack", "move".
        wording: "full" = "pick up the {color} {object}"; "varied" leaves "the" and a colour that is not needed out at
            random.
        keyframes: which of pre_grasp, grasp, lift, pre_place and place `Expert.plan` may name; one that is left out
            gives the next.
        objects, containers, colors: what is drawn from; see `simulation.objects`.
        num_objects: graspable objects on the table, the target and what it is stacked onto included.
        num_containers: in the task "move", the destination included.
        distinct_colors: the colour alone tells the graspable objects of a scene apart.
        any_yaw: objects lie at any yaw; else where the nearest of the symmetric grasps is the same one in neighbouring
            pictures (`Kind.yaw`).
        object_scale: factor on every object's natural size, as far as the gripper can still grasp it.
        support_share: share of the objects that stand on a block of `support_height_m`.
        workspace_center, workspace_extent: rectangle on the table in which objects and containers have their centres.
        table_height_m: of the table top over the robot's base.
        texture_brightness, texture_saturation, texture_contrast: of table and floor; cloth, wood, stone or tiles.
        ambient_light, headlight, directional_light: the last is a share of what the first two leave up to 1, above
            which pale tables saturate; light_tilt_rad is the angle of the directional light from the vertical.
        camera_range: "small", "medium" or "large"; see `simulation.camera`.
        image_size: side, or (height, width), px.
        fovy_deg, baseline_m: of both cameras; 52 degrees and 6.3 cm are those of a ZED Mini's cropped pictures.
        vertical_misalignment_px: the right camera is pitched so that its picture lies this much lower; the calibration
            keeps the nominal, rectified values.
        right_gain, right_offset, right_color: right view = view * gain * a factor for each channel + offset.
        noise_std: standard deviation of the sensor noise, independent in both views.
        start_x, start_y, start_height_m, start_yaw_rad: of the tool; the height over the table.
        start_in_view: False: neither view shows the gripper at the start.
    """

    robot: str = "panda"
    tasks: tuple[str, ...] = TASKS
    wording: str = "varied"
    keyframes: tuple[str, ...] = KEYFRAMES
    objects: tuple[str, ...] = GRASPABLES
    containers: tuple[str, ...] = CONTAINERS
    colors: tuple[str, ...] = tuple(COLORS)
    num_objects: int = 3
    num_containers: int = 2
    distinct_colors: bool = False
    any_yaw: bool = False
    object_scale: Range = (0.9, 1.1)
    support_share: float = 0.25
    support_height_m: Range = (0.01, 0.05)
    workspace_center: tuple[float, float] = (0.50, 0.0)
    workspace_extent: tuple[float, float] = (0.30, 0.40)
    table_height_m: Range = (-0.05, 0.05)
    texture_brightness: Range = (0.35, 0.85)
    texture_saturation: Range = (0.0, 0.18)
    texture_contrast: Range = (0.08, 0.25)
    wall_brightness: Range = (0.35, 0.80)
    ambient_light: Range = (0.30, 0.50)
    headlight: Range = (0.05, 0.15)
    directional_light: Range = (0.6, 1.0)
    light_tilt_rad: Range = (0.1, 0.9)
    camera_range: str = "small"
    image_size: int | tuple[int, int] = 128
    fovy_deg: Range = (50.0, 60.0)
    baseline_m: Range = (0.058, 0.068)
    vertical_misalignment_px: Range = (-0.5, 0.5)
    right_gain: Range = (0.9, 1.1)
    right_offset: Range = (-6.0, 6.0)
    right_color: Range = (0.97, 1.03)
    noise_std: Range = (0.0, 3.0)
    start_x: Range = (0.38, 0.50)
    start_y: Range = (-0.15, 0.15)
    start_height_m: Range = (0.14, 0.24)
    start_yaw_rad: Range = (-0.5, 0.5)
    start_in_view: bool = True

    @classmethod
    def from_preset(cls, preset: str = "default", **changes: Any) -> "WorldConfig":
        """The config of a preset, its lens and baseline as the robot's own cameras have them, with `changes`; lists, as
        JSON has them, count as tuples. ValueError for an unknown preset or option, with the nearest one.
        """
        check_choice("preset", preset, tuple(PRESETS))
        known = tuple(item.name for item in dataclasses.fields(cls))
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has preset, {', '.join(known)}"
                raise ValueError(f"world has no option {name!r}; {hint}")
        robot = changes.get("robot", cls.robot)
        check_choice("robot", robot, tuple(ROBOTS))
        values = dict(PRESETS[preset])
        for name, factor in ROBOTS[robot].lens.items():
            value = values.get(name, getattr(cls, name))
            values[name] = tuple(factor * end for end in value) if isinstance(value, tuple) else factor * value
        values |= changes
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        except TypeError as error:
            raise ValueError(f"an option of the world has a value of another kind: {error}") from error

    def __post_init__(self):
        check_choice("robot", self.robot, tuple(ROBOTS))
        check_choice("camera_range", self.camera_range, tuple(RANGES))
        check_choice("wording", self.wording, WORDINGS)
        for name, known in (
            ("tasks", TASKS),
            ("keyframes", KEYFRAMES),
            ("objects", GRASPABLES),
            ("containers", CONTAINERS),
            ("colors", tuple(COLORS)),
        ):
            values = getattr(self, name)
            values = (values,) if isinstance(values, str) else tuple(values)
            setattr(self, name, values)
            if not values:
                raise ValueError(f"{name} is empty; choose from {', '.join(known)}")
            for value in values:
                check_choice(name, value, known)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice: {', '.join(values)}")
        for name, (low, high, unit) in LIMITS.items():
            setattr(self, name, check_range(name, getattr(self, name), low, high, unit))
        if min(self.height, self.width) < 16:
            raise ValueError(f"image_size is {self.image_size}; both sides must be at least 16 px")
        if not 0 <= self.support_share <= 1:
            raise ValueError(f"support_share is {self.support_share}; it must be in [0, 1]")
        if self.ambient_light[1] + self.headlight[1] > 1:
            raise ValueError(
                f"ambient_light {self.ambient_light} and headlight {self.headlight} may add up to 1 at most, "
                "above which pale surfaces saturate"
            )
        self._check_tasks()

    def _check_tasks(self) -> None:
        """That the tasks can be drawn from the objects, and that keyframes can say how each ends."""
        if not 1 <= self.num_objects <= min(MAX_OBJECTS, len(self.objects) * len(self.colors)):
            raise ValueError(
                f"num_objects is {self.num_objects}; it must be between 1 and {MAX_OBJECTS} and at most "
                f"objects x colors = {len(self.objects) * len(self.colors)}"
            )
        if self.distinct_colors and self.num_objects > len(self.colors):
            raise ValueError(
                f"num_objects is {self.num_objects}; with distinct_colors it must be at most {len(self.colors)}, "
                "one for each of the colors"
            )
        if not 1 <= self.num_containers <= min(MAX_CONTAINERS, len(self.containers) * len(self.colors)):
            raise ValueError(
                f"num_containers is {self.num_containers}; it must be between 1 and {MAX_CONTAINERS} and at most "
                f"containers x colors = {len(self.containers) * len(self.colors)}"
            )
        if "stack" in self.tasks:
            stackable = [name for name in self.objects if name in STACKABLES]
            if self.num_objects < 2 or len(stackable) * len(self.colors) < 2:
                raise ValueError(
                    f"the task 'stack' needs num_objects >= 2 (it is {self.num_objects}) and two different ones of "
                    f"{' and '.join(STACKABLES)} among objects {self.objects} and colors {self.colors}"
                )
        if "move" in self.tasks and self.num_objects > len(self.objects):
            raise ValueError(
                f"the task 'move' names objects without their colours: num_objects ({self.num_objects}) may not exceed "
                f"the number of objects ({len(self.objects)})"
            )
        for tasks, needed in ((("pick",), "lift"), (("stack", "move"), "place")):
            if set(tasks) & set(self.tasks) and needed not in self.keyframes:
                raise ValueError(f"keyframes {self.keyframes} lack {needed!r}, the last one of {' and '.join(tasks)}")


# what differs from the defaults
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # primitives on a flat table, ideal cameras: what `make demo` learns in minutes
    "easy": {
        "tasks": ("pick",),
        "wording": "full",
        "keyframes": ("grasp", "lift"),
        "objects": PRIMITIVES,
        "object_scale": 1.0,
        "support_share": 0.0,
        "workspace_extent": (0.25, 0.30),
        "texture_saturation": (0.0, 0.15),
        "texture_contrast": (0.08, 0.20),
        "ambient_light": (0.38, 0.50),
        "directional_light": (0.7, 1.0),
        "light_tilt_rad": (0.1, 0.7),
        "fovy_deg": 45.0,
        "baseline_m": 0.063,
        "vertical_misalignment_px": 0.0,
        "right_gain": 1.0,
        "right_offset": 0.0,
        "right_color": 1.0,
        "noise_std": 0.0,
        "start_x": (0.40, 0.48),
        "start_y": (-0.12, 0.12),
        "start_height_m": (0.12, 0.17),
        "start_yaw_rad": (-0.35, 0.35),
    },
    # neither the height of an object nor its size follows from one picture, grasps are tight, and the gripper cannot be
    # compared with the target
    "geometry": {
        "objects": PRIMITIVES + SMALL_OR_THIN + ("bowl",),
        "object_scale": (0.5, 2.0),
        "support_share": 0.8,
        "support_height_m": (0.0, 0.10),
        "start_x": (0.32, 0.42),
        "start_y": (-0.20, 0.20),
        "start_height_m": (0.34, 0.44),
        "start_in_view": False,
    },
}


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `known`, naming the nearest."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}{hint}")


def check_range(name: str, value: Any, low: float, high: float, unit: str) -> Range:
    """(low, high) of a range or of one number; ValueError where it leaves the allowed [low, high]."""
    pair = (value, value) if isinstance(value, (int, float)) else tuple(value)
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(
            f"{name} is {value}; it must be a number or (low, high) with {low} <= low <= high <= {high} {unit}".rstrip()
        )
    return float(pair[0]), float(pair[1])
