"""What the page does: fields and files in, what the model sees, where it points and what it would do out."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import gradio as gr
import numpy as np

from stereovla.app.drawing import draw_chunk, draw_distances, draw_pointing, legend
from stereovla.app.frames import (
    Carried,
    Frame,
    calibration_text,
    dataset_frame,
    read_calibration,
    read_states,
    read_view,
    states_text,
)
from stereovla.app.look import Look, is_pose, look_at
from stereovla.app.space import draw_space
from stereovla.command_line import is_for_user
from stereovla.serving.served_model import ServedModel

MOST_WORLDS = 8  # open at a time; each holds an OpenGL context and some 100 MB


class Page:
    """What the page's fields and buttons do.

    Args:
        datasets: {name: splits} of those that frames can be taken from.
        open_trial: a function of a seed that opens a world of the simulator, None where there is none.
        closed_loop: why there is no simulator, in words.
    """

    def __init__(
        self,
        served: ServedModel,
        datasets: dict[str, tuple[str, ...]],
        open_trial: Callable[[int], Any] | None,
        closed_loop: str = "",
    ):
        self.served, self.datasets, self.open_trial, self.closed_loop = served, datasets, open_trial, closed_loop
        self.views = served.keys.views
        self.robots = list(served.processor.norm_stats)
        self.points = () if served.model.pointers is None else served.model.pointers.names
        self.distances = next((name for name in ("disparity", "depth") if name in served.keys.outputs), None)
        self.trials: set[Any] = set()  # the worlds that are open
        # model and renderer belong to one thread: OpenGL contexts do not move between threads
        self.thread = ThreadPoolExecutor(1, "model")

    # ------------------------------------------------------------------ what is asked

    def read(self, paths: Sequence[str | None], text: str, robot: str, states: str, calibration: str, carried) -> Frame:
        """The frame that the fields describe; ValueError says which of them is wrong."""
        given = {name: path for name, path in zip(self.views, paths, strict=True) if path}
        needed = [name for name in self.views if name in ("left", "right")]
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"the {' and the '.join(missing)} view is missing: drop a picture there")
        return Frame(
            views={name: read_view(path, name) for name, path in given.items()},
            instruction=instruction(text),
            embodiment=robot,
            states=read_states(states, self.served.model.config.state_dim),
            calibration=read_calibration(calibration),
            carried=carried or Carried(),
        )

    def fields(self, frame: Frame) -> list[Any]:
        """Inverse of `read`, in the order of its arguments."""
        views = [frame.views.get(name) for name in self.views]
        known = frame.calibration
        return [
            *views,
            frame.instruction,
            frame.embodiment,
            states_text(frame.states[-self.served.model.config.state_history :]),
            calibration_text(known),
            frame.carried,
        ]

    # ------------------------------------------------------------------ what is answered

    def answer(self, frame: Frame, seed: int) -> tuple[Look, list[Any]]:
        """A look, and what `outputs` of the page show of it."""
        look = look_at(self.served, frame, seed)
        posed = is_pose(self.served, frame.embodiment)
        space = draw_space(frame, look, posed)
        return look, [
            draw_chunk(frame, look, posed),
            *([draw_pointing(frame, look)] if self.points else []),
            *([draw_distances(look)] if self.distances else []),
            gr.update(value=space, visible=space is not None),
            self._marks(frame, look, posed),
            self._facts(frame, look),
            self._table(frame, look),
        ]

    def _marks(self, frame: Frame, look: Look, posed: bool) -> str:
        """What the marks in the first picture are, or why there are none."""
        if not posed:
            words = "This robot's actions are no steps of a tool: they are numbers below, without a place in a picture."
        elif frame.calibration is None or frame.calibration.transform_camera_to_base is None:
            words = (
                "Without a calibration that says where the camera stands, the chunk has no place in the picture; in "
                "space it has."
            )
        else:
            return marks_html(legend(look))
        return f'<div class="legend">{words}</div>'

    def _facts(self, frame: Frame, look: Look) -> str:
        robot = self.served.metadata()["embodiments"][frame.embodiment]
        rate = robot["rate_hz"]
        lasts = f", {len(look.actions) / rate:.1f} s of motion at {rate:g} Hz" if rate else ""
        count, device = len(look.actions), self.served.model.device
        words = [f"**{look.chunk_ms:.0f} ms** for a chunk of {count} actions{lasts}, on {device}"]
        if is_pose(self.served, frame.embodiment):
            now = frame.states[-1, :3]
            for name, place in (("answered", look.answered), ("pointed at", look.pointed)):
                if place is not None:
                    x, y, z = 100 * (np.asarray(place)[:3] - now)
                    words.append(f"keyframe, {name}: {x:+.1f}, {y:+.1f}, {z:+.1f} cm from the tool")
        return " · ".join(words)

    def _table(self, frame: Frame, look: Look) -> Any:
        robot = self.served.metadata()["embodiments"][frame.embodiment]
        names = robot["action_names"] or [str(number) for number in range(look.actions.shape[1])]
        rows = [[str(number), *(f"{value:+.3f}" for value in row)] for number, row in enumerate(look.actions, 1)]
        units = sorted({unit for unit in robot["action_units"] if unit in ("m", "rad")})
        label = f"Chunk, in {' and '.join(units)}" if units else "Chunk"
        return gr.update(headers=["", *names], value=rows, label=label)

    # ------------------------------------------------------------------ buttons

    def look(self, *given: Any) -> list[Any]:
        """The fields, then the seed of the noise -> outputs."""
        *fields, seed = given
        count = len(self.views)
        return self.answer(self.read(fields[:count], *fields[count:]), whole(seed, "noise seed"))[1]

    def take(self, dataset: str, split: str, episode: Any, number: Any) -> list[Any]:
        """A dataset's frame -> fields."""
        episode, number = whole(episode, "episode"), whole(number, "frame")
        if dataset not in self.datasets:
            raise ValueError(f"the dataset is {dataset!r}; there are {', '.join(self.datasets)}")
        history = self.served.model.config.state_history
        return self.fields(dataset_frame(dataset, split, episode, number, self.views, history))

    def begin(self, trial: Any, seed: Any) -> list[Any]:
        """A world of the simulator -> itself, what it may be asked, how it stands, and fields."""
        seed = whole(seed, "seed of the world")
        if trial is not None:
            trial.reset(seed)
        elif len(self.trials) >= MOST_WORLDS:
            raise ValueError(f"{MOST_WORLDS} worlds are open already; close another page, or try again in some minutes")
        else:
            trial = self.open_trial(seed)
            self.trials.add(trial)
        words = trial.instructions
        frame = trial.frame(words[0])
        return [trial, gr.update(choices=words, value=words[0]), trial.told(), *self.fields(frame)]

    def step(self, trial: Any, text: str, seed: Any) -> list[Any]:
        """One chunk of the model in the world -> how it stands, fields, and outputs of the look that decided."""
        if trial is None:
            raise ValueError("there is no world yet: begin one")
        text = instruction(text)
        trial.ask(text)
        look, outputs = self.answer(trial.frame(text), whole(seed, "noise seed"))
        for _ in trial.execute(look.actions):
            pass
        told = trial.told()
        if trial.counted != text:
            told += f"; success is that of “{trial.counted}”"
        return [told, *self.fields(trial.frame(text)), *outputs]

    def run(self, trial: Any, text: str, seed: Any) -> Iterator[list[Any]]:
        """`step` until the episode has ended."""
        while True:
            yield self.on_thread(self.step)(trial, text, seed)
            if trial.done:
                return

    # ------------------------------------------------------------------ threads and errors

    def on_thread(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act` in the model's thread; what is wrong with what was given is told on the page."""

        @wraps(act)
        def told(*given: Any) -> Any:
            try:
                return self.thread.submit(act, *given).result()
            except Exception as error:
                if isinstance(error, TypeError) or is_for_user(error):
                    raise gr.Error(str(error), duration=None, print_exception=False) from error
                traceback.print_exception(error)
                words = f"{type(error).__name__}: a fault of this program; its console says more"
                raise gr.Error(words, duration=None, print_exception=False) from error

        return told

    def close_trial(self, trial: Any) -> None:
        """Frees a world that nobody looks at."""
        if trial in self.trials:
            self.trials.remove(trial)
            self.thread.submit(trial.close)

    def close(self) -> None:
        """Frees all worlds; nothing can be asked afterwards."""
        for trial in [*self.trials]:
            self.close_trial(trial)
        self.thread.shutdown()


def marks_html(marks: Mapping[str, tuple[int, ...]]) -> str:
    """Coloured marks with their names; those of keyframes are diamonds."""
    spans = ""
    for name, colour in marks.items():
        shape = "keyframe" if "keyframe" in name else "dot"
        spans += f'<span><i class="{shape}" style="background: rgb{colour}"></i>{name}</span>'
    return f'<div class="legend">{spans}</div>'


def instruction(text: str | None) -> str:
    """That of a field; ValueError for none."""
    if not (text or "").strip():
        raise ValueError("the instruction is empty; say what the robot shall do, such as 'pick up the red cube'")
    return text.strip()


def whole(value: Any, name: str) -> int:
    """A field's whole number; ValueError for none."""
    if value is None or value != int(value) or value < 0:
        raise ValueError(f"the {name} is {value}; expected a whole number, 0 or more")
    return int(value)
