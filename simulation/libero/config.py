"""What may be chosen of LIBERO in stereo."""

from dataclasses import dataclass

from stereovla.simulation.config import KEYFRAMES, LIMITS, Pictures, Range, check_choice, check_range
from stereovla.simulation.libero.cameras import RANGES
from stereovla.simulation.libero.suites import SUITES, suite_tasks

CONTROLS = ("pose", "osc")


@dataclass
class LiberoConfig(Pictures):
    """A suite and how it is seen. The same config and seed give the same episode.

    Attributes:
        suite: one of `suites.SUITES`.
        tasks: their numbers in the suite; () = all.
        camera_range: "stock", the agent view as LIBERO has it, or "small", "medium", "large"; see `libero.cameras`.
        image_size: side, or (height, width), px.
        baseline_m: of the pair; the left view is the agent view, the right one stands beside it. A range is drawn from
            for each episode, one number is fixed.
        wrist: whether there is the view `wrist` of the camera in the hand.
        control: "pose" = states and actions of the dataset's schema at 10 Hz; "osc" = LIBERO's own at 20 Hz, see
            `libero.robot`.
        keyframes: which ones `LiberoExpert.plan` may name.
    """

    suite: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    camera_range: str = "stock"
    image_size: int | tuple[int, int] = 128
    baseline_m: Range = (0.063, 0.063)
    wrist: bool = False
    control: str = "pose"
    keyframes: tuple[str, ...] = KEYFRAMES

    def __post_init__(self):
        check_choice("suite", self.suite, SUITES)
        check_choice("camera_range", self.camera_range, tuple(RANGES))
        check_choice("control", self.control, CONTROLS)
        for name in self.keyframes:
            check_choice("keyframes", name, KEYFRAMES)
        if "place" not in self.keyframes:
            raise ValueError(f"keyframes {self.keyframes} lack 'place', the last one of every task")
        count = len(suite_tasks(self.suite))
        self.tasks = tuple(self.tasks) or tuple(range(count))
        wrong = [number for number in self.tasks if not 0 <= number < count]
        if wrong or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks are {self.tasks}; {self.suite} has the tasks 0 to {count - 1}, each named once")
        low, high, unit = LIMITS["baseline_m"]
        self.baseline_m = check_range("baseline_m", self.baseline_m, low, high, unit)
        if isinstance(self.image_size, list):
            self.image_size = tuple(self.image_size)
        if min(self.height, self.width) < 16:
            raise ValueError(f"image_size is {self.image_size}; both sides must be at least 16 px")
